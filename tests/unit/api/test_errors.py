"""Every error that clients meet: an HTTP answer before a stream, its last frame within, in both dialects.

The server, the API and the engine are the real ones. What is wrong with a request has tests of its own in
Anthropic's dialect (anthropic/test_messages.py), whose fields are others.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxd.api.served_model import ServedModel
from mlxd.errors import NotReadyError
from tests.unit.api.anthropic.events import read_events
from tests.unit.api.fakes import sse_json
from tests.unit.api.stack import ACCESS_LOGGER, Stack, error_of, play
from tests.unit.engine.fake_worker import EOS, generate

PATH = "/v1/completions"
ASK = {"prompt": [3, 4], "max_tokens": 50, "ignore_eos": True}
KEYS = {"api_keys": [{"name": "alice", "key": "ka"}]}
MESSAGES = "/v1/messages"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
BOTH = pytest.mark.parametrize("path", [PATH, MESSAGES], ids=["openai", "anthropic"])
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def asking(path: str, **fields: Any) -> dict[str, Any]:
    """A request of the dialect that `path` speaks, for a long answer."""
    if path == PATH:
        return {**ASK, **fields}
    content = f"t{talkative_word()}"
    return {
        "max_tokens": 50,
        "model": "default",
        "messages": [{"role": "user", "content": content}],
        **fields,
    }


def talkative_word() -> int:
    """A token which, as a whole prompt, is followed by thirty tokens before the end."""
    return next(n for n in range(2, 64) if EOS not in generate([n], 30))


def settings(**sections: Any) -> dict[str, Any]:
    return {"model": {"chat_template": TEMPLATE}, **sections}


def check(path: str, response: Any, status: int, kind: str, code: str | None) -> None:
    """An answer that is an error, in the dialect of `path`. Anthropic's has no codes, and 529 for 503."""
    if path == PATH:
        assert response.status == status
        error = error_of(response)
        assert (error["type"], error["code"]) == (kind, code)
        return
    assert response.status == (529 if status == 503 else status)
    body = json.loads(response.body)
    assert set(body) == {"type", "error", "request_id"} and set(body["error"]) == {"type", "message"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["request_id"].encode() == response.headers[b"x-request-id"]


@STREAMED
@pytest.mark.parametrize(
    ("request_", "status", "kind", "code", "param"),
    [
        (("POST", PATH, b"{", {}), 400, "invalid_request_error", None, None),
        (("POST", PATH, {"max_tokens": "ten"}, {}), 400, "invalid_request_error", None, "max_tokens"),
        (("POST", PATH, {"temperature": 9}, {}), 400, "invalid_request_error", None, "temperature"),
        (("POST", PATH, {"prompt": [99]}, {}), 400, "invalid_request_error", None, "prompt"),
        (
            ("POST", PATH, {"prompt": [3] * 130}, {}),
            400,
            "invalid_request_error",
            "context_length_exceeded",
            "prompt",
        ),
        (
            ("POST", PATH, {"prompt": [[3], [3] * 130]}, {}),
            400,
            "invalid_request_error",
            "context_length_exceeded",
            "prompt[1]",
        ),
        (("POST", PATH, {"prompt": [[3], []]}, {}), 400, "invalid_request_error", None, "prompt[1]"),
        (("POST", PATH, {"prompt": [[99], [3]]}, {}), 400, "invalid_request_error", None, "prompt[0]"),
        (("POST", PATH, {}, {"x_api_key": "wrong"}), 401, "authentication_error", "invalid_api_key", None),
        (("POST", "/v1/nothing", {}, {}), 404, "not_found_error", "not_found", None),
        (("POST", PATH, {"model": "gpt"}, {}), 404, "not_found_error", "model_not_found", "model"),
        (("GET", PATH, {}, {}), 405, "invalid_request_error", "method_not_allowed", None),
        (("POST", PATH, {"user": "x" * 2000}, {}), 413, "request_too_large", "request_too_large", None),
        (
            ("POST", PATH, {}, {"content_type": "text/plain"}),
            415,
            "invalid_request_error",
            "unsupported_media_type",
            None,
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_said_before_any_stream(
    model_folder: Path,
    request_: tuple[str, str, Any, dict[str, str]],
    status: int,
    kind: str,
    code: str | None,
    param: str | None,
    stream: bool,
) -> None:
    async def scenario(stack: Stack) -> None:
        method, path, fields, headers = request_
        body = fields if isinstance(fields, bytes) else {**ASK, "stream": stream, **fields}
        response = await stack.ask(method, path, body, **{"x_api_key": "ka", "x_request_id": "me", **headers})
        assert response.status == status
        error = error_of(response)
        assert (error["type"], error["code"], error["param"]) == (kind, code, param)
        assert response.headers[b"content-type"] == b"application/json"
        if status == 405:
            assert response.headers[b"allow"] == b"OPTIONS, POST"
        if status == 401:
            assert response.headers[b"www-authenticate"] == b"Bearer"
        if code == "context_length_exceeded":
            for number in ("128", "130", "50"):  # the limit, the prompt, and what was asked for
                assert number in error["message"]

    play(scenario, model_folder, {"limits": KEYS, "server": {"max_body_bytes": 1500}})


@BOTH
def test_a_body_that_does_not_come_is_408(model_folder: Path, path: str) -> None:
    async def scenario(stack: Stack) -> None:
        client = stack.connect()
        await client.send("POST", path, b"{", content_length="20")
        stack.time += 61
        client.connection.check_time(stack.time)
        check(path, await client.response(), 408, "invalid_request_error", "request_timeout")

    play(scenario, model_folder)


@BOTH
@STREAMED
def test_limits_are_429(model_folder: Path, path: str, stream: bool) -> None:
    async def scenario(stack: Stack) -> None:
        body = asking(path, max_tokens=1, stream=stream)
        assert (await stack.ask("POST", path, body)).status == 200
        response = await stack.ask("POST", path, body)
        check(path, response, 429, "rate_limit_error", "rate_limit_exceeded")
        assert response.headers[b"retry-after"] == b"60"
        for name in (b"limit", b"remaining", b"reset"):
            assert b"x-ratelimit-%b-requests" % name in response.headers

    play(scenario, model_folder, settings(limits={"rate_limit": 1}))


@BOTH
@STREAMED
def test_a_full_queue_is_503_with_retry_after(model_folder: Path, path: str, stream: bool) -> None:
    async def scenario(stack: Stack) -> None:
        stack.worker.hold = True
        running, waiting = stack.connect(), stack.connect()
        for client in (running, waiting):
            await client.send("POST", PATH, ASK)
        response = await stack.ask("POST", path, asking(path, stream=stream))
        check(path, response, 503, "overloaded_error", "overloaded")
        assert response.headers[b"retry-after"] == b"1"
        stack.worker.release_held()
        assert [(await client.response()).status for client in (running, waiting)] == [200, 200]

    play(scenario, model_folder, settings(scheduler={"max_queue": 1, "max_num_seqs": 1}))


@BOTH
@STREAMED
def test_an_unready_server_is_503_with_retry_after(model_folder: Path, path: str, stream: bool) -> None:
    async def scenario(stack: Stack) -> None:
        stack.worker.die()
        await stack.until(lambda: not stack.is_ready())
        response = await stack.ask("POST", path, asking(path, stream=stream))
        check(path, response, 503, "overloaded_error", "not_ready")
        assert b"restarting" in response.body
        assert response.headers[b"retry-after"] == b"2"
        await stack.until(stack.is_ready)

    play(scenario, model_folder, settings())


@BOTH
@STREAMED
def test_bugs_are_500_with_the_request_id_and_no_internals(
    model_folder: Path, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stack: Stack) -> None:
        monkeypatch.setattr(stack.engine, "submit", lambda requests, **options: 1 / 0)
        response = await stack.ask("POST", path, asking(path, stream=stream), x_request_id="rid")
        check(path, response, 500, "api_error", "internal_error")
        message = json.loads(response.body)["error"]["message"]
        assert "rid" in message and "division" not in message

    play(scenario, model_folder, settings())


def fail_row(stack: Stack) -> None:
    stack.worker.fail_rows |= {request.request_id for request in stack.engine.requests()}


def spoil_row(stack: Stack) -> None:
    stack.worker.nan_rows |= {request.request_id for request in stack.engine.requests()}


async def cancel(stack: Stack) -> None:
    assert (await stack.ask("DELETE", "/v1/requests/mine")).status == 200


WITHIN: list[tuple[str, Callable[[Stack], Any], dict[str, Any], int, str, str | None, str]] = [
    ("a grammar fails", fail_row, {}, 400, "invalid_request_error", None, "request"),
    ("the model fails", spoil_row, {}, 500, "api_error", "internal_error", "error"),
    ("timeout", lambda stack: None, {"timeout_seconds": 0.03}, 504, "timeout_error", "timeout", "timeout"),
    ("cancelled", cancel, {}, 499, "invalid_request_error", "request_cancelled", "cancel"),
    ("shutdown", lambda stack: stack.app.end_streams(), {}, 503, "overloaded_error", "not_ready", "shutdown"),
    (
        "worker failed",
        lambda stack: stack.engine.abort_all(NotReadyError("the model worker failed")),
        {},
        503,
        "overloaded_error",
        "not_ready",
        "shutdown",
    ),
]


@BOTH
@STREAMED
@pytest.mark.parametrize(
    ("break_it", "limits", "status", "kind", "code", "reason"),
    [case[1:] for case in WITHIN],
    ids=[case[0] for case in WITHIN],
)
def test_what_goes_wrong_while_generating(
    model_folder: Path,
    path: str,
    break_it: Callable[[Stack], Any],
    limits: dict[str, Any],
    status: int,
    kind: str,
    code: str | None,
    reason: str,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A whole answer is the error; in a stream it is the last frame, at OpenAI followed by [DONE], once."""

    async def scenario(stack: Stack) -> None:
        client = stack.connect()
        await client.send("POST", path, asking(path, stream=stream), x_request_id="mine")
        await stack.until(lambda: bool(stack.worker.plans) and (bool(client.output) or not stream))
        stack.worker.hold = True
        broken = break_it(stack)
        if broken is not None:
            await broken
        if break_it in (fail_row, spoil_row):
            stack.worker.release_held()
        response = await client.response()
        if not stream:
            check(path, response, status, kind, code)
        elif path == PATH:
            assert response.status == 200
            *_, last = sse_json(response.body)
            error = last["error"]
            assert set(last) == {"error"} and set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == (kind, code)
        else:
            assert response.status == 200
            *_, last = read_events(response.body)
            assert last["type"] == "error" and last["error"]["type"] == kind
            assert last["request_id"] == "mine"
        stack.worker.release_held()
        await stack.until(lambda: stack.app._services.traffic.num_in_flight == 0)
        assert +stack.app._services.traffic.aborts == {reason: 1}

    with caplog.at_level(logging.INFO, ACCESS_LOGGER):
        play(scenario, model_folder, settings(limits=limits))
    [line] = [r for r in caplog.records if r.name == ACCESS_LOGGER and r.request_id == "mine"]
    if path == MESSAGES and status == 503:
        status = 529
    assert (line.status, line.error) == (200 if stream else status, code or kind)


@BOTH
@STREAMED
def test_nothing_begins_once_everything_was_told_to_end(
    model_folder: Path, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that was being read at the deadline: the answer would be cut off without a word."""
    encode = ServedModel.encode

    async def scenario(stack: Stack) -> None:
        reading, done = asyncio.Event(), asyncio.Event()

        async def read_slowly(model: ServedModel, *arguments: Any, **options: Any) -> Any:
            reading.set()
            await done.wait()
            return await encode(model, *arguments, **options)

        monkeypatch.setattr(ServedModel, "encode", read_slowly)
        client = stack.connect()
        body = asking(path, stream=stream) | ({"prompt": "t3 t4"} if path == PATH else {})
        await client.send("POST", path, body)
        await reading.wait()
        stack.app.end_streams()
        done.set()
        check(path, await client.response(), 503, "overloaded_error", "not_ready")
        assert not stack.worker.plans

    play(scenario, model_folder, settings())


@STREAMED
def test_a_client_that_leaves_is_499_in_log_and_metrics(
    model_folder: Path, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its blocks are free before the next plan."""

    async def scenario(stack: Stack) -> None:
        stack.worker.hold = True
        client = stack.connect()
        await client.send("POST", PATH, {**ASK, "prompt": [3] * 60, "stream": stream}, x_request_id="gone")
        assert stack.engine.scheduler.kv.num_used_blocks > 0
        num_plans = len(stack.worker.plans)
        await client.lose()
        assert stack.engine.requests() == []
        assert stack.engine.scheduler.kv.num_used_slots == 0
        assert stack.engine.scheduler.running == []
        assert len(stack.worker.plans) == num_plans
        stack.worker.release_held()
        traffic = stack.app._services.traffic
        assert traffic.requests[PATH, "499", "abort"] == 1
        assert traffic.aborts["disconnect"] == 1
        assert traffic.num_in_flight == 0

    with caplog.at_level(logging.INFO, ACCESS_LOGGER):
        play(scenario, model_folder)
    [line] = [r for r in caplog.records if r.name == ACCESS_LOGGER]
    assert (line.status, line.request_id, line.error) == (499, "gone", "client_closed_request")
    assert (line.prompt_tokens, line.finish_reason) == (60, "abort")
