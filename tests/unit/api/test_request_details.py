"""GET /v1/requests/{id}: how a request met the prefix cache, and who may know; salts that part tenants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxd.api.responses import RequestDetails, ServerStatus
from mlxd.engine.request_log import MAX_ENDED, EndedRequest, RequestLog
from tests.unit.api.fakes import FakeEngine, call, make_app
from tests.unit.api.stack import Client, Stack, play

PATH = "/v1/completions"
KEYS = {"limits": {"api_keys": [{"name": "alice", "key": "ka"}, {"name": "bob", "key": "kb"}]}}
FIRST = list(range(2, 40))
SECOND = [*FIRST[:20], 50, 51, *FIRST[22:]]


async def complete(stack: Stack, prompt: list[int], **headers: str) -> dict[str, Any]:
    ask = {"prompt": prompt, "max_tokens": 3, "ignore_eos": True}
    response = await stack.ask("POST", PATH, ask, **headers)
    assert response.status == 200, response.body
    return dict(json.loads(response.body))


async def details(stack: Stack, request_id: str, **headers: str) -> dict[str, Any]:
    """The only sequence's part; the answer must fit its description."""
    response = await stack.ask("GET", f"/v1/requests/{request_id}", **headers)
    assert response.status == 200, response.body
    msgspec.json.decode(response.body, type=RequestDetails)
    [sequence] = json.loads(response.body)["sequences"]
    return dict(sequence)


async def begin(stack: Stack, prompt: list[int], **headers: str) -> Client:
    """A request whose first step the worker holds back."""
    stack.worker.hold = True
    client = stack.connect()
    await client.send("POST", PATH, {"prompt": prompt, "max_tokens": 20}, **headers)
    await stack.until(lambda: any(request.slot >= 0 for request in stack.engine.requests()))
    return client


def texts(first: int, stop: int) -> str:
    return " ".join(f"t{n}" for n in range(first, stop))


def test_a_miss_says_where_and_why(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        first = await complete(stack, FIRST)
        found = await details(stack, first["id"])
        assert (found["cache_hit_type"], found["cached_tokens"], found["prompt_tokens"]) == ("miss", 0, 38)
        assert found["cache_miss"]["cause"] == "new"
        second = await complete(stack, SECOND)
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 20
        found = await details(stack, second["id"])
        assert (found["phase"], found["finish_reason"], found["completion_tokens"]) == (
            "finished",
            "length",
            3,
        )
        assert (found["cache_hit_type"], found["cached_tokens"]) == ("lcp", 20)
        assert found["cache_miss"] == {
            "cause": "diverged",
            "position": 20,
            "message": None,
            "token": {"id": 50, "text": "t50"},
            "text_before": texts(2, 22),
            "text": f"t50 t51 {texts(24, 40)}",
            "cached_token": {"id": 22, "text": "t22"},
            "cached_text": texts(22, 26),  # a block has four tokens
        }
        third = await complete(stack, SECOND)
        assert third["usage"]["prompt_tokens_details"]["cached_tokens"] == 37
        found = await details(stack, f"{third['id']}-0")
        assert (found["cache_hit_type"], found["cache_miss"]) == ("exact", None)

    play(scenario, model_folder, max_model_len=64)


def test_a_running_request_is_described_too(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        client = await begin(stack, FIRST)
        [running] = stack.engine.requests()
        found = await details(stack, running.request_id)
        assert (found["phase"], found["cache_miss"]["position"]) == ("prefill", 0)
        status = (await stack.ask("GET", "/v1/status")).body
        assert msgspec.json.decode(status, type=ServerStatus).requests[0].cache_miss is not None
        await client.lose()
        stack.worker.release_held()

    play(scenario, model_folder, max_model_len=64)


def test_keys_see_their_own_requests_and_never_what_others_asked(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        await complete(stack, FIRST, x_api_key="ka")
        second = await complete(stack, SECOND, x_api_key="kb")
        assert (await stack.ask("GET", f"/v1/requests/{second['id']}")).status == 401
        assert (await stack.ask("GET", f"/v1/requests/{second['id']}", x_api_key="ka")).status == 404
        miss = (await details(stack, second["id"], x_api_key="kb"))["cache_miss"]
        assert (miss["position"], miss["token"]["text"], miss["text_before"]) == (20, "t50", texts(2, 22))
        assert "cached_token" not in miss and "cached_text" not in miss
        client = await begin(stack, [9, *SECOND], x_api_key="kb")
        [running] = json.loads((await stack.ask("GET", "/v1/status", x_api_key="ka")).body)["requests"]
        assert set(running["cache_miss"]) == {"cause", "position", "message"}
        await client.lose()
        stack.worker.release_held()

    play(scenario, model_folder, KEYS, max_model_len=64)


def test_no_text_is_kept_where_misses_are_not_to_be_explained(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        await complete(stack, FIRST)
        second = await complete(stack, SECOND)
        miss = (await details(stack, second["id"]))["cache_miss"]
        assert miss == {"cause": "diverged", "position": 20, "message": None}
        [ended] = stack.engine.ended.find(second["id"], None)
        assert ended.prefix is not None and ended.prefix.hit.cached_token_ids == ()

    play(scenario, model_folder, {"cache": {"explain_misses": False}}, max_model_len=64)


def test_every_id_that_the_client_has_seen_finds_it(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        ask = {"prompt": FIRST, "max_tokens": 3, "ignore_eos": True, "n": 2}
        for headers in ({}, {"x_request_id": "the.clients_own-1"}):
            response = await stack.ask("POST", PATH, ask, **headers)
            response_id = json.loads(response.body)["id"]
            request_id = dict(response.headers)[b"x-request-id"].decode()
            for name, count in ((response_id, 2), (f"{response_id}-1", 1), (request_id, 2)):
                found = json.loads((await stack.ask("GET", f"/v1/requests/{name}")).body)
                assert (found["id"], len(found["sequences"])) == (name, count)
        assert request_id == "the.clients_own-1"
        client = await begin(stack, SECOND, x_request_id="running")
        assert (await details(stack, "running"))["phase"] == "prefill"
        await client.lose()
        stack.worker.release_held()

    play(scenario, model_folder, max_model_len=64)


def test_an_id_of_ones_own_finds_nobody_elses(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        await complete(stack, FIRST, x_api_key="ka", x_request_id="same")
        await complete(stack, SECOND, x_api_key="kb", x_request_id="same")
        assert (await details(stack, "same", x_api_key="kb"))["prompt_tokens"] == len(SECOND)
        assert (await details(stack, "same", x_api_key="ka"))["cache_hit_type"] == "miss"

    play(scenario, model_folder, KEYS, max_model_len=64)


def test_an_unknown_request_is_404(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        assert (await stack.ask("GET", "/v1/requests/nobody")).status == 404

    play(scenario, model_folder)


def test_the_last_few_hundred_are_remembered() -> None:
    log = RequestLog()
    for n in range(MAX_ENDED + 10):
        log.add(EndedRequest(f"r{n}-0", "alice", {}, None))
    assert log.find("r9", None) == [] and log.find("r10", "alice") and log.find("r10", "bob") == []
    assert log.find("r1", None) == [], "r10-0 and others are no choices of r1"


@pytest.mark.parametrize(
    ("key", "fields", "salt"),
    [
        ("ka", {}, ""),
        ("ka", {"cache_salt": "mine"}, "0 mine"),
        ("kb", {}, "3 bob"),
        ("kb", {"cache_salt": "mine"}, "3 bobmine"),
    ],
)
def test_salts_of_the_key_and_the_request_both_count(key: str, fields: dict[str, str], salt: str) -> None:
    keys = [{"name": "alice", "key": "ka"}, {"name": "bob", "key": "kb", "cache_salt": "bob"}]
    engine = FakeEngine()
    app = make_app(engine, {"limits": {"api_keys": keys}})
    body = {"model": "default", "prompt": "hi", **fields}
    assert call(app, "POST", PATH, json=body, headers={"x-api-key": key}).status_code == 200
    assert engine.submitted[0].cache_salt == salt


def test_all_keys_can_be_isolated_at_once() -> None:
    keys = [{"name": "alice", "key": "ka"}, {"name": "bob", "key": "kb"}]
    keys += [{"name": f"team{n}", "key": f"kt{n}", "cache_salt": "team"} for n in (1, 2)]
    engine = FakeEngine()
    app = make_app(engine, {"limits": {"api_keys": keys, "isolate_keys": True}})
    for key in ("ka", "kb", "kt1", "kt2"):
        body = {"model": "default", "prompt": "hi", "cache_salt": "mine"}
        assert call(app, "POST", PATH, json=body, headers={"x-api-key": key}).status_code == 200
    salts = [request.cache_salt for request in engine.submitted]
    assert salts == ["5 alicemine", "3 bobmine", "4 teammine", "4 teammine"]


def test_a_message_may_have_a_salt() -> None:
    engine = FakeEngine()
    body = {"model": "default", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    for salt in (None, "mine"):
        answer = call(make_app(engine), "POST", "/v1/messages", json={**body, "cache_salt": salt})
        assert answer.status_code == 200
    assert [request.cache_salt for request in engine.submitted] == ["", "0 mine"]
    answer = call(make_app(engine), "POST", "/v1/messages", json={**body, "cache_salt": ""})
    assert answer.status_code == 400 and "cache_salt" in answer.json()["error"]["message"]


def test_an_empty_salt_is_refused() -> None:
    body = {"model": "default", "prompt": "hi", "cache_salt": ""}
    response = call(make_app(FakeEngine()), "POST", PATH, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"


def test_the_engine_is_told_where_messages_begin() -> None:
    engine = FakeEngine()
    messages = [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": " yes "}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "and?"}]})
    body = {"model": "default", "messages": messages}
    assert call(make_app(engine), "POST", "/v1/chat/completions", json=body).status_code == 200
    [sequence] = engine.submitted
    text = "<|user|>héllo<|end|><|assistant|> yes <|end|><|user|>and?<|end|><|assistant|>"
    assert sequence.num_prompt_characters == len(text)
    assert sequence.message_starts == (text.index("héllo"), text.index(" yes "), text.index("and?"))
