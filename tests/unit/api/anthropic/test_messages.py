"""POST /v1/messages and its count_tokens: every field honoured or refused, whole answers and streams."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from mlxd.api.anthropic.schema import MessagesRequest
from mlxd.engine.request import FinishReason
from mlxd.errors import (
    GenerationTimeout,
    HTTPStatusError,
    NotReadyError,
    OverloadedError,
    RateLimitError,
    WorkerError,
)
from tests.unit.api.anthropic.events import assembled, read_events
from tests.unit.api.fakes import (
    MAX_MODEL_LEN,
    FakeEngine,
    Wire,
    call,
    encode,
    fails,
    make_app,
    says,
    until,
    with_defaults,
)

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
BODY: dict[str, Any] = {
    "model": "default",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hi"}],
}
PROMPT = "<|user|>Hi<|end|><|assistant|>"
TOOL = {"name": "f", "description": "Does f.", "input_schema": {"type": "object", "properties": {}}}


def post(engine: FakeEngine, path: str = PATH, config: dict[str, Any] | None = None, **fields: Any) -> Any:
    return call(make_app(engine, config), "POST", path, json={**BODY, **fields})


def ask(engine: FakeEngine, config: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The message; the same whole, streamed, and assembled from the stream."""
    whole = post(engine, config=config, **fields)
    assert whole.status_code == 200, whole.text
    streamed = post(engine, config=config, **fields, stream=True)
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    message: dict[str, Any] = assembled(read_events(streamed.content))
    assert message == whole.json()
    return message


def refusal(path: str = PATH, **fields: Any) -> str:
    """The message of a 400, which is the same for a stream."""
    messages = []
    for stream in (False, True):
        response = post(FakeEngine(), path, **fields, stream=stream)
        assert response.status_code == 400, response.text
        body = response.json()
        assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
        assert body["error"]["type"] == "invalid_request_error"
        messages.append(body["error"]["message"])
    assert messages[0] == messages[1]
    return str(messages[0])


def submitted(**fields: Any) -> Any:
    """What the engine is asked for."""
    engine = FakeEngine()
    ask(engine, **fields)
    return engine.submitted[0]


def prompt_of(**fields: Any) -> str:
    engine = FakeEngine()
    ask(engine, **fields)
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(engine.submitted[0].prompt_token_ids, False)


# Answers


def test_whole_message_has_anthropics_shape() -> None:
    assert ask(FakeEngine(says("Héllo"))) == {
        "id": f"msg_{1:032x}",
        "type": "message",
        "role": "assistant",
        "model": "org/tiny-model",
        "content": [{"type": "text", "text": "Héllo"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(encode(PROMPT)),
            "output_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 1,
        },
    }


def test_a_streams_events_in_their_order() -> None:
    response = post(FakeEngine(says("ab")), stream=True)
    events = read_events(response.content)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"] == {
        "input_tokens": len(encode(PROMPT)),
        "output_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
    assert events[2] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert events[3]["delta"] == {"type": "text_delta", "text": "a"}
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 3


@pytest.mark.parametrize("text", ["", '"\\\n\u2028', "data: [DONE]\n\n", "日本語 🙂"])
def test_awkward_texts(text: str) -> None:
    assert ask(FakeEngine(says(text)))["content"] == [{"type": "text", "text": text}]


@pytest.mark.parametrize(
    ("finish", "stop_reason", "expected"),
    [
        (FinishReason.STOP, None, ("end_turn", None)),
        (FinishReason.STOP, 7, ("end_turn", None)),
        (FinishReason.STOP, "END", ("stop_sequence", "END")),
        (FinishReason.LENGTH, None, ("max_tokens", None)),
    ],
)
def test_stop_reasons(finish: FinishReason, stop_reason: Any, expected: tuple[str, str | None]) -> None:
    answer = ask(FakeEngine(says("a", finish=finish, stop_reason=stop_reason)))
    assert (answer["stop_reason"], answer["stop_sequence"]) == expected


def test_a_client_that_marks_cache_points_adds_the_counts_up() -> None:
    usage = ask(FakeEngine(), cache_control={"type": "ephemeral"})["usage"]
    assert usage["cache_read_input_tokens"] == 1
    assert usage["input_tokens"] == len(encode(PROMPT)) - 1


# What is asked of the engine


def test_fields_reach_the_engine() -> None:
    request = submitted(max_tokens=7, temperature=0.5, top_p=0.25, top_k=3, stop_sequences=["a", "bc"])
    assert (request.max_tokens, request.stop) == (7, ("a", "bc"))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 3)


def test_integers_may_be_floats_and_optional_fields_null() -> None:
    nulls = dict.fromkeys(set(MessagesRequest.__struct_fields__) - BODY.keys())
    assert submitted(**{name: None for name in nulls if name != "stream"}, max_tokens=7.0).max_tokens == 7


@pytest.mark.parametrize(
    ("given", "default", "model", "expected"),
    [(None, None, None, 1.0), (None, None, 0.6, 0.6), (None, 0.7, 0.6, 0.7), (0.0, 0.7, 0.6, 0.0)],
)
def test_temperature_from_request_server_model(
    given: float | None, default: float | None, model: float | None, expected: float
) -> None:
    engine = FakeEngine(files=with_defaults(default_temperature=model))
    ask(engine, {"defaults": {"temperature": default}}, temperature=given)
    assert engine.submitted[0].sampling.temperature == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"user_id": "u"}},
        {"service_tier": "auto"},
        {"context_management": {"edits": []}},
        {"betas": ["x"]},
        {"mcp_servers": [], "container": None},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ],
)
def test_informative_and_unknown_fields_change_nothing(fields: dict[str, Any]) -> None:
    assert prompt_of(**fields) == PROMPT


def test_beta_query_and_headers_are_tolerated() -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-1,b-2"}
    response = call(make_app(FakeEngine()), "POST", f"{PATH}?beta=true", json=BODY, headers=headers)
    assert response.status_code == 200


# The prompt


def test_the_conversation_is_rendered() -> None:
    prompt = prompt_of(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
            {"type": "text", "text": "S"},
        ],
        messages=[
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": True},
                    {"type": "text", "text": "go"},
                ],
            },
        ],
    )
    assert prompt == (
        '<|system|>S<|end|><|user|>q<|end|><|assistant|>(hm)f{"a": 1}<|end|>'
        "<|tool|>f: Error: r<|end|><|user|>go<|end|><|assistant|>"
    )


def test_a_prefill_is_continued() -> None:
    messages = [*BODY["messages"], {"role": "assistant", "content": "The answer is ("}]
    assert prompt_of(messages=messages) == "<|user|>Hi<|end|><|assistant|>The answer is ("


def test_thinking_switches_the_template() -> None:
    assert prompt_of(thinking={"type": "disabled"}) == PROMPT + "quick:"
    for kind in ("enabled", "adaptive", "between_tools"):
        assert prompt_of(thinking={"type": kind}) == PROMPT


COUNTED: list[dict[str, Any]] = [
    {},
    {"system": "Be brief."},
    {"system": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}]},
    {"tools": [TOOL], "tool_choice": {"type": "auto"}},
    {"tools": [TOOL], "tool_choice": {"type": "none"}},
    {"thinking": {"type": "disabled"}},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]


@pytest.mark.parametrize("fields", COUNTED)
def test_counted_tokens_are_input_tokens(fields: dict[str, Any]) -> None:
    counted = post(FakeEngine(), COUNT, **fields)
    assert counted.status_code == 200 and counted.json().keys() == {"input_tokens"}
    whole = post(FakeEngine(), **fields).json()["usage"]
    assert counted.json()["input_tokens"] == whole["input_tokens"] + (
        whole["cache_read_input_tokens"] if "cache_control" in json.dumps(fields) else 0
    )


def test_tokens_are_counted_without_max_tokens() -> None:
    body = {name: value for name, value in BODY.items() if name != "max_tokens"}
    response = call(make_app(FakeEngine()), "POST", COUNT, json=body)
    assert response.json() == {"input_tokens": len(encode(PROMPT))}


# Tools and thinking

CALL = '<tool_call>{"name": "f", "arguments": {"a": [1, "é"]}}</tool_call>'
USED = {"type": "tool_use", "name": "f", "input": {"a": [1, "é"]}}
THINKS = {"chat": {"reasoning_parser": "qwen3"}}
THOUGHT = "<think>\nhm\n</think>\n\nHello"


def test_a_call_becomes_tool_use() -> None:
    answer = ask(FakeEngine(says(f"Let me see.\n{CALL}")), tools=[TOOL])
    text, used = answer["content"]
    assert text == {"type": "text", "text": "Let me see."}
    assert used == {**USED, "id": used["id"]} and re.fullmatch(r"call_\w{24}", used["id"])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)


def test_calls_have_ids_of_their_own() -> None:
    first, second = ask(FakeEngine(says(CALL + CALL)), tools=[TOOL])["content"]
    assert first["input"] == second["input"] and first["id"] != second["id"]


def test_parallel_calls_can_be_turned_off() -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(ask(FakeEngine(says(CALL + CALL)), tools=[TOOL], tool_choice=choice)["content"]) == 1


def test_input_comes_in_pieces() -> None:
    events = read_events(post(FakeEngine(says(CALL)), tools=[TOOL], stream=True).content)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert len(deltas) > 5 and {delta["type"] for delta in deltas} == {"input_json_delta"}


def test_a_call_that_is_cut_off_ends_with_max_tokens() -> None:
    answer = post(FakeEngine(says(CALL[:50], finish=FinishReason.LENGTH)), tools=[TOOL]).json()
    assert answer["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": {"type": "none"}}])
def test_no_calls_without_tools(fields: dict[str, Any]) -> None:
    assert ask(FakeEngine(says(CALL)), **fields)["content"] == [{"type": "text", "text": CALL}]


def test_the_chosen_tool_alone_is_offered() -> None:
    tools = [TOOL, {**TOOL, "name": "other"}]
    prompt = prompt_of(tools=tools, tool_choice={"type": "tool", "name": "f"})
    assert "Does f." in prompt and "other" not in prompt
    assert "other" in prompt_of(tools=tools, tool_choice={"type": "any"})


@pytest.mark.parametrize(
    ("thinking", "content"),
    [
        (None, [{"type": "thinking", "thinking": "hm", "signature": "mlxd"}]),
        ({"type": "adaptive"}, [{"type": "thinking", "thinking": "hm", "signature": "mlxd"}]),
        (
            {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
            [{"type": "thinking", "thinking": "", "signature": "mlxd"}],
        ),
        ({"type": "disabled"}, []),
    ],
)
def test_thinking_blocks(thinking: Any, content: list[Any]) -> None:
    answer = ask(FakeEngine(says(THOUGHT)), THINKS, thinking=thinking)
    assert answer["content"] == [*content, {"type": "text", "text": "Hello"}]


def test_a_budget_reaches_the_engine_where_the_model_thinks() -> None:
    engine = FakeEngine()
    thinking = {"type": "enabled", "budget_tokens": 99}
    post(engine, config=THINKS, thinking=thinking)
    post(engine, thinking=thinking)
    limited, unlimited = engine.submitted
    assert limited.thinking.max_tokens == 99
    assert unlimited.thinking is None


# Answers of a certain form

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORM = {"type": "json_schema", "schema": OBJECT}


@pytest.mark.parametrize("fields", [{"output_config": {"format": FORM}}, {"output_format": FORM}])
def test_a_form_becomes_a_grammar(fields: dict[str, Any]) -> None:
    grammar = submitted(**fields).sampling.grammar
    assert grammar is not None and "integer" in grammar.grammar
    assert submitted().sampling.grammar is None


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "f"}])
def test_a_call_that_is_asked_for_is_enforced(choice: dict[str, Any]) -> None:
    grammar = submitted(tools=[TOOL], tool_choice=choice).sampling.grammar
    assert grammar is not None and grammar.triggers == ()


# Refusals


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_tokens": None}, "max_tokens: expected"),
        ({"max_tokens": 0}, "max_tokens: expected `int` >= 1"),
        ({"messages": []}, "messages: at least one"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: missing"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "this model reads text only"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences: at most 16"),
        ({"container": "c"}, "container: not supported"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers: not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, {"name": "g"}]}, "tools[1].input_schema: missing"),
        ({"tools": [{**TOOL, "name": ""}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name: there are two tools 'f'"),
        ({"tools": [{**TOOL, "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: asks for a call, but there are no tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}},
            "tool_choice.name: there is no tool 'g'",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema: missing"),
        ({"output_config": {"format": {**FORM, "schema": {"type": 3}}}}, "output_config.format.schema"),
        ({"output_config": {"format": FORM}, "output_format": FORM}, "output_format: output_config.format"),
        (
            {
                "tools": [{**TOOL, "input_schema": {"properties": {"a": {"type": "nonsense"}}}}],
                "tool_choice": {"type": "any"},
            },
            "tools[0].input_schema",
        ),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], problem: str) -> None:
    assert problem in refusal(**fields)
    if fields.keys() <= {"messages", "container", "mcp_servers", "tools", "tool_choice", "thinking"}:
        assert problem in refusal(COUNT, **fields)


def test_max_tokens_is_required() -> None:
    response = call(
        make_app(FakeEngine()), "POST", PATH, json={"model": "default", "messages": BODY["messages"]}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "max_tokens: missing"


def test_a_prompt_that_is_too_long_is_told_in_anthropics_words() -> None:
    problem = refusal(messages=[{"role": "user", "content": "x" * MAX_MODEL_LEN}])
    assert (
        f"prompt is too long: {len(encode(PROMPT)) - 2 + MAX_MODEL_LEN} tokens > {MAX_MODEL_LEN} maximum"
        in problem
    )
    assert "max_tokens: 100" in problem


# Other errors


KEYS = {"limits": {"api_keys": [{"name": "a", "key": "sesame"}]}}


@pytest.mark.parametrize("header", [{"x-api-key": "sesame"}, {"authorization": "Bearer sesame"}])
def test_both_auth_headers(header: dict[str, str]) -> None:
    for path in (PATH, COUNT):
        assert call(make_app(FakeEngine(), KEYS), "POST", path, json=BODY, headers=header).status_code == 200
        response = call(make_app(FakeEngine(), KEYS), "POST", path, json=BODY)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"


def refused_by(error: HTTPStatusError) -> Any:
    engine = FakeEngine()
    engine.refusal = error
    return call(make_app(engine), "POST", PATH, json={**BODY, "stream": True}, headers={"x-request-id": "me"})


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OverloadedError("full", retry_after=9), 529, "overloaded_error"),
        (NotReadyError("loading", retry_after=9), 529, "overloaded_error"),
        (RateLimitError("slow down", retry_after=9), 429, "rate_limit_error"),
    ],
)
def test_errors_that_say_when_to_retry(error: HTTPStatusError, status: int, kind: str) -> None:
    response = refused_by(error)
    assert (response.status_code, response.headers["retry-after"]) == (status, "9")
    assert response.headers["request-id"] == "me"
    assert response.json() == {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": "me",
    }


TEXT = {"content-type": "text/plain"}


@pytest.mark.parametrize(
    ("method", "path", "kwargs", "status", "kind"),
    [
        ("GET", PATH, {}, 405, "invalid_request_error"),
        ("DELETE", COUNT, {}, 405, "invalid_request_error"),
        ("POST", PATH + "/batches", {"json": BODY}, 404, "not_found_error"),
        ("POST", PATH, {"json": {**BODY, "model": "nobody"}}, 404, "not_found_error"),
        ("POST", COUNT, {"json": {**BODY, "model": "nobody"}}, 404, "not_found_error"),
        ("POST", PATH, {"content": b"{" + b" " * 200}, 413, "request_too_large"),
        ("POST", PATH, {"content": b"{"}, 400, "invalid_request_error"),
        (
            "POST",
            PATH,
            {"content": b"x", "headers": {"content-type": "text/plain"}},
            415,
            "invalid_request_error",
        ),
    ],
)
def test_errors_are_anthropics_on_these_paths(
    method: str, path: str, kwargs: dict[str, Any], status: int, kind: str
) -> None:
    app = make_app(FakeEngine(), {"server": {"max_body_bytes": 150}})
    response = call(app, method, path, **kwargs)
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert response.json()["request_id"] == response.headers["request-id"]


@pytest.mark.parametrize(
    ("error", "status", "kind", "message"),
    [
        (WorkerError("the worker stopped"), 500, "api_error", "the worker stopped"),
        (GenerationTimeout("too slow"), 504, "timeout_error", "too slow"),
        (NotReadyError("shutting down"), 529, "overloaded_error", "shutting down"),
        (RuntimeError("secret internals"), 500, "api_error", "generation failed"),
    ],
)
def test_errors_while_generating(error: Exception, status: int, kind: str, message: str) -> None:
    engine = FakeEngine(fails(error, after="ab"))
    response = post(engine)
    assert response.status_code == status
    assert response.json()["error"] == {"type": kind, "message": message}
    response = post(engine, stream=True)
    assert response.status_code == 200
    *events, last = read_events(response.content)
    assert [event["delta"]["text"] for event in events if "delta" in event] == ["a", "b"]
    assert last == {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": response.headers["request-id"],
    }


# While the prompt is computed


def play(scenario: Any, **config: Any) -> None:
    async def run() -> None:
        engine = FakeEngine(says("Hello"))
        engine.held = True
        await scenario(engine, make_app(engine, config))
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert engine.num_running == 0

    asyncio.run(run())


STREAM = json.dumps({**BODY, "stream": True}).encode()


def test_message_start_and_pings_come_before_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxd.api.anthropic.frames.PING_SECONDS", 0.001)

    async def scenario(engine: FakeEngine, app: Any) -> None:
        wire = Wire(app, "POST", PATH, STREAM)
        await until(lambda: wire.body.count(b"event: ping") > 3)
        assert [event["type"] for event in read_events(wire.body)][:3] == ["message_start", "ping", "ping"]
        engine.release()
        await wire.task
        assert assembled(read_events(wire.body))["content"] == [{"type": "text", "text": "Hello"}]

    play(scenario)


@pytest.mark.parametrize("body", [STREAM, json.dumps(BODY).encode()])
def test_a_client_that_leaves_frees_its_sequence(body: bytes) -> None:
    async def scenario(engine: FakeEngine, app: Any) -> None:
        wire = Wire(app, "POST", PATH, body)
        await until(lambda: engine.num_running > 0)
        wire.disconnect()
        await wire.task
        assert len(engine.cancelled) == 1

    play(scenario)


def test_a_message_is_cancelled_by_its_id() -> None:
    async def scenario(engine: FakeEngine, app: Any) -> None:
        wire = Wire(app, "POST", PATH, STREAM)
        await until(lambda: len(wire.sent) > 1)
        message_id = read_events(wire.body)[0]["message"]["id"]
        cancel = Wire(app, "DELETE", f"/v1/requests/{message_id}")
        await cancel.task
        assert cancel.status == 200
        await wire.task
        *_, last = read_events(wire.body)
        assert (last["type"], last["error"]["message"]) == ("error", "the request was cancelled")

    play(scenario)
