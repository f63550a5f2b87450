"""Forced calls and structured answers of SmolLM2, which was never taught either, through the official SDKs.

MLXD_STRUCTURED=0:200 says which calls and which schemas to try, of as many as one likes; CI tries a few.
A call or an answer that `max_tokens` cuts is none, which the finish reason says; it is counted, and must be
rare.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from bench.server import ServerProcess
from mlxd.chat.call_grammar import arguments_schema
from mlxd.chat.types import ToolSpec
from tests.unit.chat.made_schemas import TOOLS, Maker, problems

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]

TRIES = range(*map(int, os.environ.get("MLXD_STRUCTURED", "20:29").split(":")))
NUM_AT_ONCE = 32
MAX_TOKENS = 220 if len(TRIES) > 20 else 60
MANY_TOKENS = 900
"""for as many calls as there may be: SmolLM2 repeats a call as long as it may"""
MAX_CUT = 0.02
"""of all calls"""
DEEP = {"max_tokens": 1000, "temperature": 2} if len(TRIES) > 20 else {}
"""for recursive schemas: SmolLM2 by itself goes ever deeper, and so 156 of 200 came to an end, not 187"""
MIN_ANSWERED = 0.9 if len(TRIES) > 20 else 0.7
"""of all schemas"""
TIMEOUT = 600.0
ORDER = [{"role": "user", "content": "Use it."}]

Call = tuple[str, Any]
Ask = Callable[[Any, int, list[ToolSpec]], Awaitable[tuple[str, list[Call]]]]
"""Client, number of the try and tools, to finish reason and calls (name, arguments)."""


def may_call_several(number: int) -> bool:
    """Few do: their answers are long. None of those that CI tries."""
    return number % 17 == 0


def openai_fields(number: int, tools: list[ToolSpec]) -> dict[str, Any]:
    name = {"type": "function", "function": {"name": tools[0].name}}
    allowed = {"mode": "required", "tools": [name]}
    choices = ["required", name, {"type": "allowed_tools", "allowed_tools": allowed}]
    several = may_call_several(number)
    functions = [{"name": tool.name, "parameters": tool.parameters} for tool in tools]
    return {
        "model": "default",
        "messages": ORDER,
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": choices[number // 4 % 3],
        "parallel_tool_calls": several,
        "max_tokens": MANY_TOKENS if several else MAX_TOKENS,
        "seed": number,
    }


async def ask_openai(client: AsyncOpenAI, number: int, tools: list[ToolSpec]) -> tuple[str, list[Call]]:
    answer = await client.chat.completions.create(**openai_fields(number, tools))
    [choice] = answer.choices
    calls = choice.message.tool_calls or []
    return choice.finish_reason, [(call.function.name, call.function.arguments) for call in calls]


async def stream_openai(client: AsyncOpenAI, number: int, tools: list[ToolSpec]) -> tuple[str, list[Call]]:
    names: list[str] = []
    arguments: list[str] = []
    reason = ""
    async for chunk in await client.chat.completions.create(**openai_fields(number, tools), stream=True):
        [choice] = chunk.choices
        for delta in choice.delta.tool_calls or []:
            if delta.function.name:
                names.append(delta.function.name)
                arguments.append("")
            arguments[delta.index] += delta.function.arguments or ""
        reason = choice.finish_reason or reason
    return reason, list(zip(names, arguments, strict=True))


def anthropic_fields(number: int, tools: list[ToolSpec]) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [{"type": "any"}, {"type": "tool", "name": tools[0].name}]
    several = may_call_several(number)
    return {
        "model": "default",
        "messages": ORDER,
        "tools": [{"name": tool.name, "input_schema": arguments_schema(tool)} for tool in tools],
        "tool_choice": kinds[number // 4 % 2] | {"disable_parallel_tool_use": not several},
        "max_tokens": MANY_TOKENS if several else MAX_TOKENS,
    }


async def ask_anthropic(client: AsyncAnthropic, number: int, tools: list[ToolSpec]) -> tuple[str, list[Call]]:
    return said(await client.messages.create(**anthropic_fields(number, tools)))


async def stream_anthropic(
    client: AsyncAnthropic, number: int, tools: list[ToolSpec]
) -> tuple[str, list[Call]]:
    async with client.messages.stream(**anthropic_fields(number, tools)) as stream:
        return said(await stream.get_final_message())


def said(message: Any) -> tuple[str, list[Call]]:
    blocks = [block for block in message.content if block.type == "tool_use"]
    return message.stop_reason, [(block.name, json.dumps(block.input)) for block in blocks]


WAYS: dict[str, tuple[type[Any], str, Ask]] = {
    "OpenAI": (AsyncOpenAI, "/v1", ask_openai),
    "OpenAI, streamed": (AsyncOpenAI, "/v1", stream_openai),
    "Anthropic": (AsyncAnthropic, "", ask_anthropic),
    "Anthropic, streamed": (AsyncAnthropic, "", stream_anthropic),
}


async def all_at_once(tasks: Iterator[Awaitable[Any]]) -> list[Any]:
    """The results in their order, of which NUM_AT_ONCE are waited for at a time."""
    slots = asyncio.Semaphore(NUM_AT_ONCE)

    async def one(task: Awaitable[Any]) -> Any:
        async with slots:
            return await task

    return await asyncio.gather(*map(one, tasks))


def count(reasons: list[str], finished: str) -> float:
    """The part of them that finished; all others must have been cut."""
    counts = Counter(reasons)
    print(dict(counts), "cut:", [i for i, reason in zip(TRIES, reasons, strict=True) if reason == "length"])
    assert counts.keys() <= {finished, "length"}
    return counts[finished] / len(reasons)


def test_calls_that_are_asked_for_are_valid(smollm2: ServerProcess) -> None:
    """Every try through each of the ways in turn, so that a few go through all of them."""
    tried = [(list(WAYS)[i % 4], i, TOOLS[i // 4 % len(TOOLS)]) for i in TRIES]

    async def run() -> list[tuple[str, list[Call]]]:
        clients = {
            way: kind(base_url=smollm2.url + path, api_key="none", max_retries=0, timeout=TIMEOUT)
            for way, (kind, path, _) in WAYS.items()
        }
        try:
            return await all_at_once(WAYS[way][2](clients[way], i, [tool]) for way, i, tool in tried)
        finally:
            for client in clients.values():
                await client.close()

    answers = asyncio.run(run())
    for (way, _, tool), (reason, calls) in zip(tried, answers, strict=True):
        if reason in ("length", "max_tokens"):
            continue
        assert reason in ("tool_calls", "tool_use"), way
        assert calls, way
        for name, arguments in calls:
            assert name == tool.name
            assert not problems(arguments_schema(tool), arguments), (way, arguments)
    same = {"tool_use": "tool_calls", "max_tokens": "length"}
    assert count([same.get(reason, reason) for reason, _ in answers], "tool_calls") >= 1 - MAX_CUT


def test_answers_fit_their_schemas(smollm2: ServerProcess) -> None:
    schemas = [Maker(random.Random(seed)).schema() for seed in TRIES]

    async def one(client: AsyncOpenAI, number: int, schema: dict[str, Any]) -> tuple[str, str]:
        form = {"type": "json_schema", "json_schema": {"name": "made", "schema": schema}}
        fields: dict[str, Any] = {"model": "default", "response_format": form, "seed": number}
        fields |= {"messages": [{"role": "user", "content": "Make one up."}], "max_tokens": MAX_TOKENS}
        if "$defs" in schema:
            fields |= DEEP
        if number % 2:
            [choice] = (await client.chat.completions.create(**fields)).choices
            return choice.finish_reason, choice.message.content or ""
        text, reason = "", ""
        async for chunk in await client.chat.completions.create(**fields, stream=True):
            [choice] = chunk.choices
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        return reason, text

    async def run() -> list[tuple[str, str]]:
        async with AsyncOpenAI(
            base_url=f"{smollm2.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT
        ) as client:
            return await all_at_once(one(client, *numbered) for numbered in enumerate(schemas))

    answers = asyncio.run(run())
    for schema, (reason, text) in zip(schemas, answers, strict=True):
        if reason == "stop":
            assert not problems(schema, text), (schema, text)
    assert count([reason for reason, _ in answers], "stop") >= MIN_ANSWERED


def test_several_choices_streamed_with_logprobs_beside_tools(smollm2: ServerProcess) -> None:
    """All at once: an answer is one of the texts, or a call."""
    colours = ["red", "light green", "blue"]
    fields = openai_fields(1, TOOLS[2:3]) | {"tool_choice": "auto", "n": 3, "temperature": 1.5}
    texts, calls, tokens = [""] * 3, [""] * 3, [""] * 3
    reasons: dict[int, str] = {}

    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{smollm2.url}/v1", api_key="none", timeout=TIMEOUT) as client:
            stream = await client.chat.completions.create(
                **fields, stream=True, logprobs=True, extra_body={"guided_choice": colours}
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    index, delta = choice.index, choice.delta
                    texts[index] += delta.content or ""
                    for call in delta.tool_calls or []:
                        calls[index] += call.function.arguments or ""
                    if choice.logprobs is not None:
                        tokens[index] += "".join(part.token for part in choice.logprobs.content or [])
                    reasons[index] = choice.finish_reason or reasons.get(index, "")

    asyncio.run(run())
    for text, call, said, (_, reason) in zip(texts, calls, tokens, sorted(reasons.items()), strict=True):
        if reason == "stop":
            assert text in colours
            assert said.startswith(text)
        else:
            assert reason == "tool_calls" and not text
            assert not problems(TOOLS[2].parameters, call)
