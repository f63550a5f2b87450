"""What ends an answer early: the client leaving, cancels, errors, shutdown; and that nothing is left over."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mlxd.api.app import App
from mlxd.api.served_model import ServedModel
from mlxd.errors import GenerationTimeout, WorkerError
from tests.unit.api.fakes import FakeEngine, Wire, call, client, fails, make_app, says, sse_json, until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
WHOLE = json.dumps({"messages": MESSAGES}).encode()
STREAM = json.dumps({"messages": MESSAGES, "stream": True, "n": 2}).encode()

Scenario = Callable[[FakeEngine, App], Awaitable[None]]


def play(scenario: Scenario, *, held: bool = True, **config: Any) -> None:
    """Run a scenario; afterwards nothing may run any more, neither in the engine nor in the loop."""

    async def run() -> None:
        engine = FakeEngine(says("Hello"))
        engine.held = held
        app = make_app(engine, config)
        await scenario(engine, app)
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert engine.num_running == 0
        assert not app._services.active._by_id

    asyncio.run(run())


@pytest.mark.parametrize("body", [WHOLE, STREAM])
def test_a_client_that_leaves_frees_its_sequences(body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        wire = Wire(app, "POST", CHAT, body, x_request_id="me")
        await until(lambda: engine.num_running > 0)
        num_running = engine.num_running
        wire.disconnect()
        await wire.task
        assert len(engine.cancelled) == num_running

    with caplog.at_level(logging.INFO, "mlxd.api"):
        play(scenario)
    [record] = caplog.records
    assert (record.status, record.request_id) == (499, "me")  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/completions"])
def test_its_time_runs_while_its_prompt_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ServedModel.encode
    times: list[float] = []

    async def read_slowly(model: ServedModel, *arguments: Any, **options: Any) -> Any:
        clock = asyncio.get_running_loop().time
        times.append(clock())
        while clock() == times[0]:
            await asyncio.sleep(0)
        return await encode(model, *arguments, **options)

    monkeypatch.setattr(ServedModel, "encode", read_slowly)
    engine = FakeEngine(says("Hello"))
    body = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": MESSAGES}
    response = call(make_app(engine), "POST", path, json={"model": "default", "max_tokens": 5, **body})
    assert response.status_code == 200
    [since] = engine.timeouts_from
    assert since is not None and since <= times[0]


def test_a_client_that_leaves_gets_no_answer() -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        wire = Wire(app, "POST", CHAT, WHOLE)
        await until(lambda: engine.num_running > 0)
        wire.disconnect()
        await wire.task
        assert wire.sent == []

    play(scenario)


def test_a_broken_pipe_ends_a_stream() -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        wire = Wire(app, "POST", CHAT, STREAM)
        await until(lambda: len(wire.sent) > 1)
        wire.broken = True
        engine.release()
        await wire.task
        assert [message["type"] for message in wire.sent] == ["http.response.start", "http.response.body"]
        assert engine.cancelled

    play(scenario)


def test_a_broken_pipe_before_the_answer() -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        wires = [Wire(app, "POST", CHAT, STREAM), Wire(app, "GET", "/nothing"), Wire(app, "GET", "/health")]
        for wire in wires:
            wire.broken = True
        await asyncio.gather(*(wire.task for wire in wires))
        assert all(wire.sent == [] for wire in wires)

    play(scenario)


def test_a_client_that_leaves_within_its_body() -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        messages = iter(
            [
                {"type": "http.request", "body": b'{"mess', "more_body": True},
                {"type": "http.disconnect"},
            ]
        )

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            raise AssertionError("nobody is there")

        await app({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send)

    play(scenario)


@pytest.mark.parametrize("which", ["body id", "header id", "choice id"])
@pytest.mark.parametrize(("method", "suffix"), [("POST", "/cancel"), ("DELETE", "")])
def test_cancel_by_id(which: str, method: str, suffix: str) -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        wire = Wire(app, "POST", CHAT, WHOLE, x_request_id="mine")
        await until(lambda: engine.num_running > 0)
        choice_id = engine.submitted[0].request_id
        key = {"body id": choice_id.removesuffix("-0"), "header id": "mine", "choice id": choice_id}[which]
        async with client(app) as http:
            response = await http.request(method, f"/v1/requests/{key}{suffix}")
            assert response.status_code == 200
            assert response.json() == {"id": key, "object": "request", "cancelled": True}
            await wire.task
            assert (await http.request(method, f"/v1/requests/{key}{suffix}")).status_code == 404
        assert wire.status == 499
        assert json.loads(wire.body)["error"]["code"] == "request_cancelled"

    play(scenario)


def test_cancel_of_a_stream_is_its_last_frame() -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        wire = Wire(app, "POST", CHAT, STREAM, x_request_id="mine")
        await until(lambda: len(wire.sent) > 0)
        async with client(app) as http:
            assert (await http.delete("/v1/requests/mine")).status_code == 200
        await wire.task
        *_, last = sse_json(wire.body)
        assert last["error"]["code"] == "request_cancelled"
        assert wire.sent[-1]["more_body"] is False

    play(scenario)


def test_nobody_cancels_anothers_request_by_its_header_id() -> None:
    keys = {"api_keys": [{"name": "a", "key": "ka"}, {"name": "b", "key": "kb"}]}

    async def scenario(engine: FakeEngine, app: App) -> None:
        wire = Wire(app, "POST", CHAT, WHOLE, x_request_id="shared", x_api_key="ka")
        await until(lambda: engine.num_running > 0)
        async with client(app) as http:
            response = await http.delete("/v1/requests/shared", headers={"x-api-key": "kb"})
            assert response.status_code == 404
            response = await http.delete("/v1/requests/shared", headers={"x-api-key": "ka"})
            assert response.status_code == 200
        await wire.task

    play(scenario, limits=keys)


def test_shutdown_ends_streams_with_a_proper_frame() -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        stream, whole = Wire(app, "POST", CHAT, STREAM), Wire(app, "POST", CHAT, WHOLE)
        await until(lambda: engine.num_running == 3)
        app.end_streams()
        await asyncio.gather(stream.task, whole.task)
        assert stream.status == 200 and whole.status == 503
        [last] = [chunk for chunk in sse_json(stream.body) if "error" in chunk]
        assert last["error"]["code"] == "not_ready"
        assert "shutting down" in last["error"]["message"]

    play(scenario)


@pytest.mark.parametrize(
    ("error", "status", "code", "message"),
    [
        (WorkerError("the worker stopped"), 500, "worker_error", "the worker stopped"),
        (GenerationTimeout("too slow"), 504, "timeout", "too slow"),
        (RuntimeError("secret internals"), 500, "internal_error", "generation failed"),
    ],
)
def test_errors_while_generating(error: Exception, status: int, code: str, message: str) -> None:
    def app() -> App:
        return make_app(FakeEngine(fails(error, after="ab")))

    response = call(app(), "POST", CHAT, json={"messages": MESSAGES})
    assert response.status_code == status
    assert response.json()["error"] == {
        "message": message,
        "type": response.json()["error"]["type"],
        "param": None,
        "code": code,
    }
    response = call(app(), "POST", CHAT, json={"messages": MESSAGES, "stream": True})
    assert response.status_code == 200
    *chunks, last = sse_json(response.content)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "ab"
    assert (last["error"]["code"], last["error"]["message"]) == (code, message)


def test_one_failed_choice_ends_the_others() -> None:
    def script(request: Any) -> Any:
        return (fails(WorkerError("gone")) if request.index == 1 else says("long " * 50))(request)

    async def scenario(engine: FakeEngine, app: App) -> None:
        engine.script = script
        for body in (STREAM, json.dumps({"messages": MESSAGES, "n": 2}).encode()):
            await Wire(app, "POST", CHAT, body).task
        assert [key.rpartition("-")[2] for key in engine.cancelled] == ["0", "0"]

    play(scenario, held=False)


def test_bugs_in_a_stream_are_its_last_frame(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mlxd.api.openai.usage.Usage.add", lambda self, output: 1 / 0)
    response = call(
        make_app(FakeEngine()),
        "POST",
        CHAT,
        json={"messages": MESSAGES, "stream": True},
        headers={"x-request-id": "rid"},
    )
    *_, last = sse_json(response.content)
    assert "rid" in last["error"]["message"] and "division" not in response.text
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_a_bug_after_the_last_token_cuts_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server then closes the socket, so that the client does not take the answer for a whole one."""
    monkeypatch.setattr("mlxd.api.openai.frames.ChatFrames.end", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(make_app(FakeEngine()), "POST", CHAT, json={"messages": MESSAGES, "stream": True})


def test_all_that_is_new_goes_out_in_one_write() -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        wire = Wire(app, "POST", CHAT, STREAM)
        await wire.task
        # Start, the roles, one write a turn (five characters and the end, two choices each), and the end.
        assert len(wire.sent) == 1 + 1 + 6 + 1
        assert [wire.sent[place]["body"].count(b"\n\n") for place in (1, 2)] == [2, 2]

    play(scenario, held=False)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_in_the_queue_is_silent_and_can_still_be_refused(path: str) -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        engine.queued = True
        body = json.dumps({"messages": MESSAGES, "prompt": "Hi", "stream": True}).encode()
        wire = Wire(app, "POST", path, body)
        await until(lambda: engine.num_running == 1)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not wire.sent
        engine.abort_all(GenerationTimeout("too slow"))
        await wire.task
        assert wire.status == 504
        assert json.loads(wire.body)["error"]["code"] == "timeout"
        # So it is with what the API ends itself.
        wire = Wire(app, "POST", path, body)
        await until(lambda: engine.num_running == 1)
        app.end_streams()
        await wire.task
        assert wire.status == 503

    play(scenario)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages"])
@pytest.mark.parametrize("queued", [False, True])
def test_long_silences_are_broken(path: str, queued: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the queue too: then the status is 200 before its time."""
    monkeypatch.setattr("mlxd.api.openai.frames._Frames.ping_seconds", 0.01)
    monkeypatch.setattr("mlxd.api.anthropic.frames.PING_SECONDS", 0.01)

    async def scenario(engine: FakeEngine, app: App) -> None:
        engine.queued = queued
        fields = {"model": "default", "messages": MESSAGES, "stream": True, "max_tokens": 50}
        if path == "/v1/completions":
            fields["prompt"] = "Hi"
        wire = Wire(app, "POST", path, json.dumps(fields).encode())
        await until(lambda: wire.sent != [] and wire.body.count(b"ping\n") >= 3)
        assert wire.status == 200
        engine.release()
        await wire.task
        data = b"".join(frame + b"\n\n" for frame in wire.body.split(b"\n\n")[:-1] if frame != b": ping")
        if path != "/v1/messages":
            assert sse_json(data)[-1]["choices"][0]["finish_reason"] == "stop"

    play(scenario)


def test_a_stream_starts_before_its_first_token() -> None:
    async def scenario(engine: FakeEngine, app: App) -> None:
        wire = Wire(app, "POST", CHAT, STREAM)
        await until(lambda: len(wire.sent) > 1)
        assert wire.status == 200
        assert [json.loads(frame[6:])["choices"][0]["delta"] for frame in wire.body.split(b"\n\n")[:-1]] == [
            {"role": "assistant", "content": ""}
        ] * 2
        engine.release()
        await wire.task

    play(scenario)
