"""OpenAI's own SDK against the app: shapes it must accept, errors it must map, bytes it must parse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import openai
import pytest

from mlxd.errors import GenerationTimeout, OverloadedError
from tests.unit.api.fakes import FakeEngine, client, encode, fails, make_app, says

T = TypeVar("T")
TEXT = 'Grüße, "Welt"\n\u2028 🙂\\'


def with_sdk(
    engine: FakeEngine, use: Callable[[openai.AsyncOpenAI], Awaitable[T]], key: str = "k", **config: Any
) -> T:
    async def run() -> T:
        async with client(make_app(engine, config)) as http:
            sdk = openai.AsyncOpenAI(api_key=key, base_url="http://test/v1", http_client=http, max_retries=0)
            return await use(sdk)

    return asyncio.run(run())


def test_chat() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        answer = await sdk.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Hi"}],
            logprobs=True,
            top_logprobs=1,
            n=2,
        )
        assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
        assert answer.choices[0].message.refusal is None
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
        joined = bytes(b for token in answer.choices[0].logprobs.content for b in token.bytes or ())
        assert joined.decode() == TEXT
        assert answer.usage and answer.usage.prompt_tokens_details
        assert answer.usage.prompt_tokens_details.cached_tokens == 1

    with_sdk(FakeEngine(says(TEXT)), use)


def test_chat_stream() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        stream = await sdk.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == [] and chunks[-1].usage
        assert chunks[-1].usage.completion_tokens == len(encode(TEXT)) + 1

    with_sdk(FakeEngine(says(TEXT)), use)


def test_stream_helper_accumulates_the_answer() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        async with sdk.chat.completions.stream(
            model="default", messages=[{"role": "user", "content": "Hi"}], n=2
        ) as stream:
            answer = await stream.get_final_completion()
        assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]

    with_sdk(FakeEngine(says(TEXT)), use)


def test_completions() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        answer = await sdk.completions.create(model="default", prompt=["a", "b"], logprobs=1)
        assert [choice.text for choice in answer.choices] == [TEXT, TEXT]
        assert answer.choices[0].logprobs and answer.choices[0].logprobs.text_offset
        stream = await sdk.completions.create(model="default", prompt=[1, 2], stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT

    with_sdk(FakeEngine(says(TEXT)), use)


def test_models() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in sdk.models.list()] == ["org/tiny-model"]
        assert (await sdk.models.retrieve("org/tiny-model")).owned_by == "vllm-mlx"

    with_sdk(FakeEngine(), use)


def refused(key: str = "k") -> dict[str, Any]:
    return {"limits": {"api_keys": [{"key": key}]}}


@pytest.mark.parametrize(
    ("expected", "fields", "config"),
    [
        (openai.AuthenticationError, {}, refused("other")),
        (openai.BadRequestError, {"temperature": 5}, {}),
        (openai.NotFoundError, {"model": "gpt-4"}, {}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_sdks_exceptions(
    expected: type[openai.APIStatusError], fields: Any, config: Any, stream: bool
) -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        ask = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        with pytest.raises(expected) as raised:
            await sdk.chat.completions.create(**{**ask, **fields})
        assert raised.value.body and raised.value.request_id

    with_sdk(FakeEngine(), use, **config)


def test_an_error_within_a_stream_is_an_exception_too() -> None:
    async def use(sdk: openai.AsyncOpenAI) -> None:
        stream = await sdk.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        seen = ""
        with pytest.raises(openai.APIError, match="slow") as raised:
            async for chunk in stream:
                seen += chunk.choices[0].delta.content or ""
        assert seen == "part" and raised.value.code == "timeout"

    with_sdk(FakeEngine(fails(GenerationTimeout("too slow"), after="part")), use)


def test_overload_says_when_to_retry() -> None:
    engine = FakeEngine()
    engine.refusal = OverloadedError("the queue is full", retry_after=9)

    async def use(sdk: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.InternalServerError) as raised:
            await sdk.completions.create(model="default", prompt="a", stream=True)
        assert raised.value.status_code == 503
        assert raised.value.response.headers["retry-after"] == "9"

    with_sdk(engine, use)
