"""The examples of the server guide and of Olla's page, as they stand there: SDK code, curl bodies, answers.

docs/conformance.yaml says which line of which document each test shows.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import anthropic
import openai
import pytest

from tests.unit.api.anthropic.events import read_events
from tests.unit.api.fakes import FILES, TOKENIZER, FakeEngine, call, client, make_app, says, sse_json

T = TypeVar("T")
NAME = "mlx-community/Llama-3.2-3B-Instruct-4bit"
OLLA = {"model": {"path": NAME}}
PARIS = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get weather for a city",
    "input_schema": CITY,
}


def hello(text: str = "Hello!") -> list[Any]:
    return [{"role": "user", "content": text}]


def with_openai(engine: FakeEngine, use: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
    async def run() -> T:
        async with client(make_app(engine)) as http:
            return await use(
                openai.AsyncOpenAI(
                    base_url="http://test/v1", api_key="not-needed", http_client=http, max_retries=0
                )
            )

    return asyncio.run(run())


def with_anthropic(engine: FakeEngine, use: Callable[[anthropic.AsyncAnthropic], Awaitable[T]]) -> T:
    # The SDK wants a client of the httpx that it uses, which has had two names.
    base = next(kind for kind in anthropic.DefaultAsyncHttpxClient.__mro__ if "httpx" in kind.__module__)
    httpx: Any = importlib.import_module(base.__module__.partition(".")[0])

    async def run() -> T:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=make_app(engine))) as http:
            return await use(
                anthropic.AsyncAnthropic(
                    base_url="http://test", api_key="not-needed", http_client=http, max_retries=0
                )
            )

    return asyncio.run(run())


def curl(path: str, body: dict[str, Any], engine: FakeEngine, config: dict[str, Any] | None = None) -> Any:
    response = call(make_app(engine, config), "POST", path, json=body)
    assert response.status_code == 200, response.text
    return response


def prompt_of(engine: FakeEngine) -> str:
    return TOKENIZER.decode(engine.submitted[-1].prompt_token_ids, False)


# The guide, OpenAI


def test_chat_with_the_sdk() -> None:
    engine = FakeEngine(says("Hi there"))

    async def use(sdk: openai.AsyncOpenAI) -> None:
        response = await sdk.chat.completions.create(model="default", messages=hello(), max_tokens=100)
        assert response.choices[0].message.content == "Hi there"
        stream = await sdk.chat.completions.create(
            model="default", messages=hello("Tell me a story"), stream=True
        )
        text = ""
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                text += chunk.choices[0].delta.content
        assert text == "Hi there"

    with_openai(engine, use)
    assert [request.max_tokens for request in engine.submitted] == [100, 32768]


def test_completions_with_the_sdk() -> None:
    engine = FakeEngine(says(" Paris"))

    async def use(sdk: openai.AsyncOpenAI) -> None:
        response = await sdk.completions.create(
            model="default", prompt="The capital of France is", max_tokens=50
        )
        assert response.choices[0].text == " Paris"

    with_openai(engine, use)
    assert engine.submitted[0].max_tokens == 50


def test_tools_with_the_sdk() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        response = await sdk.chat.completions.create(
            model="default",
            messages=hello("What's the weather in Paris?"),
            tools=[
                {
                    "type": "function",
                    "function": {
                        "name": "get_weather",
                        "description": "Get weather for a city",
                        "parameters": CITY,
                    },
                }
            ],
        )
        assert response.choices[0].message.tool_calls
        [tc] = response.choices[0].message.tool_calls
        assert tc.type == "function"
        assert f"{tc.function.name}: {tc.function.arguments}" == 'get_weather: {"city": "Paris"}'

    with_openai(FakeEngine(says(PARIS)), use)


COLORS = {
    "type": "object",
    "properties": {"colors": {"type": "array", "items": {"type": "string"}}},
    "required": ["colors"],
}


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "colors", "schema": COLORS}},
    ],
    ids=["json_object", "json_schema"],
)
def test_structured_output_with_the_sdk(response_format: Any) -> None:
    """What the answer is held to is the grammar's business; here: that one is asked for."""
    engine = FakeEngine(says('{"colors": ["red", "blue", "green"]}'))

    async def use(sdk: openai.AsyncOpenAI) -> None:
        response = await sdk.chat.completions.create(
            model="default", messages=hello("List 3 colors"), response_format=response_format
        )
        data = json.loads(response.choices[0].message.content or "")
        assert "colors" in data

    with_openai(engine, use)
    assert engine.submitted[0].sampling.grammar is not None


# The guide, Anthropic


def test_a_message_with_the_sdk() -> None:
    async def use(sdk: anthropic.AsyncAnthropic) -> None:
        response = await sdk.messages.create(model="default", max_tokens=256, messages=hello())
        assert response.content[0].type == "text" and response.content[0].text == "Hi there"
        assert response.id.startswith("msg_") and response.stop_reason == "end_turn"
        assert response.model == "org/tiny-model"
        assert response.usage.input_tokens > 0 and response.usage.output_tokens == len("Hi there") + 1

    with_anthropic(FakeEngine(says("Hi there")), use)


def test_a_message_stream_with_the_sdk() -> None:
    async def use(sdk: anthropic.AsyncAnthropic) -> None:
        async with sdk.messages.stream(
            model="default", max_tokens=256, messages=hello("Tell me a story")
        ) as stream:
            assert "".join([text async for text in stream.text_stream]) == "Once."

    with_anthropic(FakeEngine(says("Once.")), use)


@pytest.mark.parametrize(
    ("system", "shown"),
    [
        ("You are a helpful coding assistant.", "You are a helpful coding assistant."),
        (
            [
                {"type": "text", "text": "You are a helpful assistant."},
                {"type": "text", "text": "Be concise in your answers."},
            ],
            "You are a helpful assistant.\nBe concise in your answers.",
        ),
    ],
    ids=["a string", "a list of blocks"],
)
def test_system_messages_with_the_sdk(system: Any, shown: str) -> None:
    engine = FakeEngine()

    async def use(sdk: anthropic.AsyncAnthropic) -> None:
        await sdk.messages.create(model="default", max_tokens=256, system=system, messages=hello("Hi"))

    with_anthropic(engine, use)
    assert " ".join(prompt_of(engine).split()).startswith("<|system|>" + " ".join(shown.split()))


def test_the_tool_loop_with_the_sdk() -> None:
    engine = FakeEngine(says(f"Let me check.\n{PARIS}"))

    async def use(sdk: anthropic.AsyncAnthropic) -> None:
        question = hello("What's the weather in Paris?")
        ask: dict[str, Any] = {"model": "default", "max_tokens": 1024, "tools": [WEATHER]}
        response = await sdk.messages.create(**ask, messages=question)
        assert response.stop_reason == "tool_use"
        [block] = [block for block in response.content if block.type == "tool_use"]
        assert (block.name, block.input) == ("get_weather", {"city": "Paris"})
        assert block.id.startswith("call_")
        engine.script = says("The weather in Paris is sunny, 22C.")
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny, 22C"}
        response = await sdk.messages.create(
            **ask,
            messages=[
                *question,
                {"role": "assistant", "content": response.content},
                {"role": "user", "content": [result]},
            ],
        )
        assert response.content[0].text == "The weather in Paris is sunny, 22C."

    with_anthropic(engine, use)
    assert "Sunny, 22C" in prompt_of(engine)


def test_several_turns_with_the_sdk() -> None:
    engine = FakeEngine(says("Alice"))
    turns: list[Any] = [
        {"role": "user", "content": "My name is Alice."},
        {"role": "assistant", "content": "Nice to meet you, Alice!"},
        {"role": "user", "content": "What's my name?"},
    ]

    async def use(sdk: anthropic.AsyncAnthropic) -> None:
        response = await sdk.messages.create(model="default", max_tokens=100, messages=turns)
        assert response.content[0].type == "text" and response.content[0].text == "Alice"

    with_anthropic(engine, use)
    shown = [prompt_of(engine).find(turn["content"]) for turn in turns]
    assert -1 not in shown and shown == sorted(shown)


def test_tokens_are_counted_with_tools_and_system() -> None:
    """Of system, messages, tool_use inputs, tool_result contents and tools' names, texts and schemas."""
    body: dict[str, Any] = {"model": "default", "messages": hello("Hello, how are you?")}
    parts: list[dict[str, Any]] = [
        {"system": "You are helpful."},
        {
            "tools": [
                {
                    "name": "search",
                    "description": "Search the web",
                    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
                }
            ]
        },
        {
            "messages": [
                *body["messages"],
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "1", "name": "search", "input": {"q": "long"}}],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "1", "content": "found"}],
                },
            ]
        },
    ]
    counts = []
    for part in [{}, *parts]:
        body |= part
        answer = curl("/v1/messages/count_tokens", body, FakeEngine()).json()
        assert answer.keys() == {"input_tokens"}
        counts.append(answer["input_tokens"])
    assert counts == sorted(set(counts)), "each part counts"


# The guide, curl


def test_curl_chat() -> None:
    body = {"model": "default", "messages": hello(), "max_tokens": 100}
    answer = curl("/v1/chat/completions", body, FakeEngine()).json()
    assert answer["choices"][0]["message"]["content"] == "Hello"
    streamed = curl("/v1/chat/completions", {**body, "stream": True}, FakeEngine())
    assert sse_json(streamed.content)[-1]["choices"][0]["finish_reason"] == "stop"


def test_curl_response_format() -> None:
    engine = FakeEngine(says('{"colors": []}'))
    form = {"type": "json_object"}
    body = {"model": "default", "messages": hello("List 3 colors"), "response_format": form}
    answer = curl("/v1/chat/completions", body, engine).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"colors": []}
    assert engine.submitted[0].sampling.grammar is not None


def test_curl_messages() -> None:
    body = {"model": "default", "max_tokens": 256, "messages": hello()}
    assert curl("/v1/messages", body, FakeEngine()).json()["content"] == [{"type": "text", "text": "Hello"}]
    streamed = curl("/v1/messages", {**body, "stream": True}, FakeEngine())
    assert read_events(streamed.content)[-1]["type"] == "message_stop"
    counted = curl("/v1/messages/count_tokens", {"model": "default", "messages": hello()}, FakeEngine())
    assert counted.json()["input_tokens"] > 0


def test_special_tokens_are_filtered_from_streams() -> None:
    """The template's own marker, written by the model in the middle of its answer."""
    engine = FakeEngine(says("a<|end|>b"))
    events = read_events(
        curl(
            "/v1/messages",
            {"model": "default", "max_tokens": 9, "stream": True, "messages": hello()},
            engine,
        ).content
    )
    assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == "ab"


# Olla's page


def test_olla_chat() -> None:
    body = {
        "model": NAME,
        "messages": [
            {"role": "system", "content": "You are a helpful AI assistant."},
            {"role": "user", "content": "What is MLX?"},
        ],
        "temperature": 0.7,
        "max_tokens": 300,
        "stream": False,
    }
    engine = FakeEngine()
    answer = curl("/v1/chat/completions", body, engine, OLLA).json()
    assert (answer["object"], answer["model"]) == ("chat.completion", NAME)
    assert answer["id"].startswith("chatcmpl-") and isinstance(answer["created"], int)
    [choice] = answer["choices"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "stop")
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", "Hello")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    [request] = engine.submitted
    assert (request.max_tokens, request.sampling.temperature) == (300, 0.7)


def test_olla_stream() -> None:
    body = {"model": NAME, "messages": hello(), "stream": True}
    chunks = sse_json(curl("/v1/chat/completions", body, FakeEngine(says("MLX")), OLLA).content)
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", chunks[0]["created"], NAME)
    }
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert (first["delta"]["role"], first["finish_reason"]) == ("assistant", None)
    assert "".join(choice["delta"]["content"] for choice in middle) == "MLX"
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert all(choice["index"] == 0 and choice["logprobs"] is None for choice in (first, *middle, last))


def test_olla_completion() -> None:
    body = {
        "model": NAME,
        "prompt": "Apple Silicon is designed for",
        "max_tokens": 200,
        "temperature": 0.8,
        "top_p": 0.95,
        "stream": False,
    }
    engine = FakeEngine(says(" speed."))
    answer = curl("/v1/completions", body, engine, OLLA).json()
    assert (answer["object"], answer["model"]) == ("text_completion", NAME)
    assert answer["id"].startswith("cmpl-") and isinstance(answer["created"], int)
    [choice] = answer["choices"]
    assert {name: choice[name] for name in ("text", "index", "logprobs", "finish_reason")} == {
        "text": " speed.",
        "index": 0,
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert answer["usage"].keys() >= {"prompt_tokens", "completion_tokens", "total_tokens"}
    sampling = engine.submitted[0].sampling
    assert (engine.submitted[0].max_tokens, sampling.temperature, sampling.top_p) == (200, 0.8, 0.95)


def test_ollas_defaults() -> None:
    engine = FakeEngine(files=replace(FILES, default_temperature=None, default_top_p=None))
    answer = curl("/v1/chat/completions", {"model": "default", "messages": hello()}, engine)
    assert answer.headers["content-type"].startswith("application/json"), "stream: false"
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p) == (1.0, 1.0)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.0, 0.0)
