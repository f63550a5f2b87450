"""Tools and thinking over /v1/chat/completions: what reaches the engine, whole answers, streams, the SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxd.engine.request import FinishReason, GenerationRequest, RequestOutput
from mlxd.text.thinking import ThinkingTags
from tests.unit.api.fakes import (
    FakeEngine,
    call,
    client,
    encode,
    make_app,
    says,
    sse_json,
    with_defaults,
)

T = TypeVar("T")

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
PARIS = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
NOW = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
THINKS = {"chat": {"reasoning_parser": "qwen3"}}
OPENS = "{% for m in messages %}{{ m.content }}{% endfor %}<think>{{ '\n' }}"


def ask(engine: FakeEngine, config: dict[str, Any] | None = None, **fields: Any) -> Any:
    response = call(make_app(engine, config), "POST", PATH, json={"messages": USER, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def stream(engine: FakeEngine, config: dict[str, Any] | None = None, **fields: Any) -> list[Any]:
    body = {"messages": USER, "stream": True, **fields}
    response = call(make_app(engine, config), "POST", PATH, json=body)
    assert response.status_code == 200, response.text
    return sse_json(response.content)


def with_sdk(engine: FakeEngine, use: Callable[[openai.AsyncOpenAI], Awaitable[T]], **config: Any) -> T:
    async def run() -> T:
        async with client(make_app(engine, config)) as http:
            sdk = openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=http, max_retries=0)
            return await use(sdk)

    return asyncio.run(run())


def joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """The message that a choice's deltas make, and its finish_reason; checks how calls are written."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    calls: list[dict[str, Any]] = message["tool_calls"]
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or ""
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                assert part["type"] == "function" and part["function"]["arguments"] == ""
                calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
            else:
                assert part.keys() == {"index", "function"} and part["index"] == len(calls) - 1
                calls[-1]["arguments"] += part["function"]["arguments"]
        message["finish_reason"] = choice["finish_reason"]
    return message


def flat(choice: dict[str, Any]) -> dict[str, Any]:
    """The same of a whole answer's choice."""
    message = choice["message"]
    assert message["reasoning"] == message["reasoning_content"]
    return {
        "content": message["content"] or "",
        "reasoning": message["reasoning"] or "",
        "tool_calls": [{"id": c["id"], **c["function"]} for c in message.get("tool_calls", ())],
        "finish_reason": choice["finish_reason"],
    }


def seen(request: GenerationRequest) -> bytes:
    """The prompt, as the fake's ids of bytes."""
    return bytes(token_id for token_id in request.prompt_token_ids if token_id < 256)


def test_a_call_in_a_whole_answer() -> None:
    [choice] = ask(FakeEngine(says(PARIS)), tools=[WEATHER])["choices"]
    [call_] = choice["message"].pop("tool_calls")
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning": None,
        "reasoning_content": None,
    }
    assert call_.pop("id").removeprefix("call_").isalnum()
    assert call_ == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        "Plain words.",
        f"Let me see.\n{PARIS}\n{NOW}",
        f"<think>Well.</think>Let me see. {PARIS} and so",
        f"<think>Well. {PARIS}",
        "<think>Cut off",
        '<tool_call>{"name": "weather", "arguments": {"city": "Par',
        "<tool_call> is how it begins.",
    ],
)
@pytest.mark.parametrize("interval", [1, 3, 50])
def test_a_stream_is_the_whole_answer_in_pieces(text: str, interval: int) -> None:
    config = {**THINKS, "defaults": {"stream_interval": interval}}
    tools = [WEATHER, TIME]

    def gathered(request: GenerationRequest) -> Iterable[RequestOutput]:
        """As the engine gathers tokens for stream_interval."""
        *outputs, last = says(text)(request)
        for start in range(0, len(outputs), request.stream_interval):
            first, *rest = outputs[start : start + request.stream_interval]
            for output in rest:
                first.absorb(output)
            yield first
        yield last

    whole = flat(ask(FakeEngine(says(text)), config, tools=tools)["choices"][0])
    pieces = joined(stream(FakeEngine(gathered), config, tools=tools))
    assert pieces == whole
    assert [c["name"] for c in whole["tool_calls"]] == [
        name for name in ("weather", "time") if f'"{name}"' in text
    ]


FRAGMENTS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>"),
        *('{"name": "time", "arguments": {', '"a": 1', "}}", " ", "\n", "x", "<", "ä"),
    ]
)


@given(fragments=st.lists(FRAGMENTS, max_size=10), parser=st.sampled_from(["hermes", "qwen", "auto"]))
@settings(max_examples=40, deadline=None)
def test_streamed_equals_not_streamed_for_any_text(fragments: list[str], parser: str) -> None:
    text = "".join(fragments)
    config = {"chat": {"reasoning_parser": "qwen3", "tool_call_parser": parser}}
    whole = ask(FakeEngine(says(text)), config, tools=[TIME])["choices"][0]
    assert joined(stream(FakeEngine(says(text)), config, tools=[TIME])) == flat(whole)


def test_choices_have_calls_of_their_own() -> None:
    engine = FakeEngine(lambda request: says((PARIS, "No.", NOW)[request.index])(request))
    chunks = stream(engine, tools=[WEATHER, TIME], n=3)
    messages = [joined(chunks, index) for index in range(3)]
    assert [[c["name"] for c in m["tool_calls"]] for m in messages] == [["weather"], [], ["time"]]
    assert [m["finish_reason"] for m in messages] == ["tool_calls", "stop", "tool_calls"]
    ids = [c["id"] for m in messages for c in m["tool_calls"]]
    assert len(set(ids)) == 2
    engine = FakeEngine(lambda request: says("xy"[request.index] + (PARIS, NOW)[request.index])(request))
    answer = ask(engine, tools=[WEATHER, TIME], n=2)
    assert [flat(c)["content"] for c in answer["choices"]] == ["x", "y"]


def test_best_of_reads_the_best_with_its_own_parser() -> None:
    # The fake's tokens are the less likely, the higher their id.
    engine = FakeEngine(lambda request: says(("zz" + PARIS, "!" * 20 + NOW)[request.index])(request))
    [choice] = ask(engine, tools=[WEATHER, TIME], best_of=2)["choices"]
    assert flat(choice)["tool_calls"][0]["name"] == "time"


def test_the_sdk_runs_a_tool_loop() -> None:
    """Call, result, answer: what the SDK gives back is what it may send again."""

    engine = FakeEngine(says(PARIS))

    async def use(sdk: openai.AsyncOpenAI) -> None:
        messages: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
        tools: Any = [WEATHER, TIME]
        first = await sdk.chat.completions.create(model="default", messages=messages, tools=tools)
        message = first.choices[0].message
        assert first.choices[0].finish_reason == "tool_calls" and message.content is None
        assert message.tool_calls
        for tool_call in message.tool_calls:
            assert tool_call.type == "function"
            assert json.loads(tool_call.function.arguments) == {"city": "Paris"}
        messages += [
            message,
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
        ]
        engine.script = says("It is sunny.")
        async with sdk.chat.completions.stream(model="default", messages=messages, tools=tools) as answer:
            final = await answer.get_final_completion()
        assert final.choices[0].message.content == "It is sunny."
        assert final.choices[0].finish_reason == "stop"

    with_sdk(engine, use)
    prompt = seen(engine.submitted[1])
    again = PARIS.replace("<tool_call>", "<tool_call>\n").replace("</tool_call>", "\n</tool_call>")
    assert bytes(encode(again)) in prompt
    assert bytes(encode("<tool_response>\nsunny\n</tool_response>")) in prompt


def test_the_sdk_accumulates_streamed_calls() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        async with sdk.chat.completions.stream(
            model="default",
            messages=USER,
            tools=[WEATHER, TIME],  # type: ignore[arg-type, list-item]
        ) as answer:
            final = await answer.get_final_completion()
        calls = final.choices[0].message.tool_calls
        assert calls and [c.function.name for c in calls] == ["weather", "time"]
        assert [json.loads(c.function.arguments) for c in calls] == [{"city": "Paris"}, {}]
        assert final.choices[0].message.content == "Look:"

    with_sdk(FakeEngine(says(f"Look: {PARIS} {NOW}")), use)


def test_the_guides_code_for_thinking_models() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        response = await sdk.chat.completions.create(model="default", messages=USER)  # type: ignore[arg-type]
        message: Any = response.choices[0].message
        assert (message.reasoning, message.content) == ("17 × 23", "391")
        chunks: Any = await sdk.chat.completions.create(model="default", messages=USER, stream=True)  # type: ignore[arg-type]
        thinking, content, both = "", "", 0
        async for chunk in chunks:
            delta = chunk.choices[0].delta
            both += bool(delta.reasoning and delta.content)
            if delta.reasoning:
                assert not content
                thinking += delta.reasoning
                assert delta.reasoning_content == delta.reasoning
            if delta.content:
                content += delta.content
        assert (thinking, content, both) == ("17 × 23", "391", 0)

    with_sdk(FakeEngine(says("<think>\n17 × 23\n</think>\n\n391")), use, **THINKS)


def test_without_thinking_deltas_are_as_short_as_ever() -> None:
    chunks = stream(FakeEngine(says("ab")))
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]


def test_an_answer_that_was_cut_says_so() -> None:
    text = PARIS.removesuffix("</tool_call>")
    for script in (says(text, finish=FinishReason.LENGTH),):
        whole = ask(FakeEngine(script), tools=[WEATHER])["choices"][0]
        assert whole["finish_reason"] == "length"
        assert flat(whole)["tool_calls"][0]["arguments"] == '{"city": "Paris"}'
        assert joined(stream(FakeEngine(script), tools=[WEATHER])) == flat(whole)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_a_call_is_text(fields: dict[str, Any]) -> None:
    engine = FakeEngine(says(PARIS))
    [choice] = ask(engine, **fields)["choices"]
    assert choice["message"]["content"] == PARIS and choice["finish_reason"] == "stop"
    assert engine.submitted[0].prompt_token_ids == encode("<|user|>Hi<|end|><|assistant|>")


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ("auto", ["weather", "time"]),
        ("required", ["weather", "time"]),
        ({"type": "function", "function": {"name": "time"}}, ["time"]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TIME]}}, ["time"]),
    ],
)
def test_the_model_sees_what_it_may_call(choice: Any, named: list[str]) -> None:
    engine = FakeEngine(says(NOW))
    answer = ask(engine, tools=[WEATHER, TIME], tool_choice=choice)
    assert flat(answer["choices"][0])["tool_calls"][0]["name"] == "time"
    prompt = seen(engine.submitted[0])
    names = [n for n in ("weather", "time") if bytes(encode(f'"function": {{"name": "{n}"')) in prompt]
    assert names == named


def test_one_call_at_most() -> None:
    text = f"{PARIS}{NOW} Done."
    fields = {"tools": [WEATHER, TIME], "parallel_tool_calls": False}
    whole = flat(ask(FakeEngine(says(text)), **fields)["choices"][0])
    assert [c["name"] for c in whole["tool_calls"]] == ["weather"]
    assert (whole["content"], whole["finish_reason"]) == ("", "tool_calls")
    engine = FakeEngine(says(text))
    assert joined(stream(engine, n=2, **fields)) == whole
    # The engine is told when the call is complete, each sequence for itself.
    first, second = (request.make_end_check for request in engine.submitted)
    assert first is not None and second is not None
    assert first()(PARIS) and not second()(PARIS[:-20])
    engine = FakeEngine(says(text))
    ask(engine, tools=[WEATHER])
    assert engine.submitted[0].make_end_check is None


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_tools_are_refused_before_anything_begins(streamed: bool) -> None:
    engine = FakeEngine()
    body = {"messages": USER, "tools": [WEATHER, WEATHER], "stream": streamed}
    response = call(make_app(engine), "POST", PATH, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools[1].function.name"
    assert engine.submitted == []


def test_logprobs_go_with_calls_and_thoughts() -> None:
    text = f"<think>é</think>a{PARIS}"
    fields = {"tools": [WEATHER], "logprobs": True, "top_logprobs": 1}
    whole = ask(FakeEngine(says(text)), THINKS, **fields)["choices"][0]
    assert bytes(b for token in whole["logprobs"]["content"] for b in token["bytes"]).decode() == text
    chunks = stream(FakeEngine(says(text)), THINKS, **fields)
    assert joined(chunks) == flat(whole)
    content = [
        token
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert content == whole["logprobs"]["content"]


def test_thinking_is_counted() -> None:
    def script(request: GenerationRequest) -> Iterable[RequestOutput]:
        for output in says("<think>abc</think>d")(request):
            output.num_reasoning_tokens = min(3, output.num_output_tokens)
            yield output

    usage = ask(FakeEngine(script), THINKS, n=2)["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 6}
    chunks = stream(FakeEngine(script), THINKS, stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


def test_the_engine_is_told_how_to_count_and_when_to_stop() -> None:
    engine = FakeEngine()
    ask(engine, THINKS)
    assert engine.submitted[0].thinking is not None
    assert engine.submitted[0].thinking.tags == ThinkingTags(start="<think>", end="</think>")
    assert engine.submitted[0].thinking.max_tokens is None
    ask(engine, THINKS, thinking_token_budget=7, tools=[TIME])
    params = engine.submitted[1].thinking
    assert params is not None and params.max_tokens == 7
    assert list(params.closing_token_ids) == encode("\n</think>\n\n")
    assert "<tool_call>" in params.tags.interrupts
    plain = FakeEngine()
    ask(plain)
    assert plain.submitted[0].thinking is None


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_token_budget": 0},
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_a_template_that_thinks_regardless_is_stopped_at_once(fields: dict[str, Any]) -> None:
    engine = FakeEngine(says("b"), files=with_defaults(chat_templates={"default": OPENS}))
    answer = ask(engine, **fields)
    assert engine.submitted[0].prompt_token_ids == encode("Hi<think>\n\n</think>\n\n")
    assert flat(answer["choices"][0])["content"] == "b"
    ask(engine)
    assert engine.submitted[1].prompt_token_ids == encode("Hi<think>\n")


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({}, "||||"),
        ({"reasoning_effort": "low"}, "low||||"),
        ({"reasoning_effort": "none"}, "|False|False||"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "|True|True||"),
        ({"enable_thinking": True}, "|True|True||"),
        ({"enable_thinking": False, "chat_template_kwargs": {"thinking": True}}, "|False|True||"),
        ({"chat_template_kwargs": {"enable_thinking": True, "x": 1}}, "|True|||1"),
        ({"thinking_token_budget": 9}, "|||9|"),
        ({"thinking_token_budget": 9, "chat_template_kwargs": {"thinking_budget": 3}}, "|||3|"),
        ({"thinking_token_budget": -1}, "||||"),
    ],
)
def test_what_the_template_is_told_of_thinking(fields: dict[str, Any], seen: str) -> None:
    template = "{{ reasoning_effort }}|{{ enable_thinking }}|{{ thinking }}|{{ thinking_budget }}|{{ x }}"
    files = with_defaults(chat_templates={"default": "{{ messages[0].content }}" + template})
    engine = FakeEngine(files=files)
    ask(engine, THINKS, **fields)
    assert engine.submitted[0].prompt_token_ids == encode("Hi" + seen)


def test_special_tokens_are_kept_only_where_a_parser_reads_them() -> None:
    config = {"chat": {"tool_call_parser": "mistral"}}
    engine = FakeEngine()
    for fields, skips in (
        ({}, True),
        ({"tools": [TIME]}, False),
        ({"skip_special_tokens": False}, False),
        ({"tools": [TIME], "tool_choice": "none"}, True),
    ):
        ask(engine, config, **fields)
        assert engine.submitted[-1].skip_special_tokens is skips
    # <s> is a special token of the fake tokenizer's, [TOOL_CALLS] is none.
    text = "a<s>b[TOOL_CALLS]time{}"
    hidden = flat(ask(FakeEngine(says(text)), config, tools=[TIME])["choices"][0])
    assert (hidden["content"], hidden["tool_calls"][0]["name"]) == ("ab", "time")
    shown = ask(FakeEngine(says(text)), config, tools=[TIME], skip_special_tokens=False)
    assert flat(shown["choices"][0])["content"] == "a<s>b"


def test_tokenize_sees_the_prompt_with_tools() -> None:
    engine = FakeEngine()
    app = make_app(engine)
    tokens = call(app, "POST", "/tokenize", json={"messages": USER, "tools": [WEATHER]}).json()["tokens"]
    call(app, "POST", PATH, json={"messages": USER, "tools": [WEATHER]})
    assert tokens == engine.submitted[0].prompt_token_ids
