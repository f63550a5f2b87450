"""The four standing tests (docs/architecture.md) over HTTP with SmolLM2 in float32.

Greedy output equals mlx-lm's own, token for token: alone, in a batch with others that sample, streamed and
not, and when the pool is so small that requests are preempted.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from bench.report import ROOT
from bench.server import ServerProcess
from tests.e2e.sdk import connect, connect_async, user

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]

MAX_TOKENS = 24
BATCH = 32
QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Write the first line of a poem about the sea.",
    "List three prime numbers and say why they are prime.",
    "Translate 'good morning' into Spanish, French and German.",
    "Explain in detail how a bicycle stays upright when it moves, and what the rider does about it. " * 4,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a completion came to. `num_tokens` counts the end-of-turn token too."""

    text: str
    finish_reason: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt as token ids, and mlx-lm's greedy answer: its tokens as texts, and what that makes."""

    prompt: list[int]
    tokens: list[str]
    answer: Answer


@pytest.fixture(scope="module")
def references(smollm2: ServerProcess) -> list[Reference]:
    """Prompts as the server makes them; answers by mlx-lm in a process of its own."""
    with httpx.Client(base_url=smollm2.url) as client:
        prompts = [
            client.post("/tokenize", json={"model": "default", "messages": user(question)}).json()["tokens"]
            for question in QUESTIONS
        ]
    folder = model_folder()
    asked = json.dumps([[prompt, MAX_TOKENS] for prompt in prompts])
    command = [sys.executable, "-m", "tests.e2e.reference", str(folder)]
    done = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    references = []
    for prompt, token_ids in zip(prompts, json.loads(done.stdout), strict=True):
        stopped = len(token_ids) < MAX_TOKENS
        answer = Answer(
            tokenizer.decode(token_ids), "stop" if stopped else "length", len(token_ids) + stopped
        )
        references.append(Reference(prompt, [tokenizer.decode([i]) for i in token_ids], answer))
    return references


def model_folder() -> Path:
    """Where the worker converted SmolLM2 to; found by asking the worker's own resolver, which has no MLX."""
    code = (
        "from mlxd.config import ModelConfig; from mlxd.worker.model_source import resolve_model;"
        "print(resolve_model(ModelConfig(path='demo:smollm2'), lambda _: None, lambda _: None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


async def complete(client: AsyncOpenAI, prompt: list[int], **fields: Any) -> Answer:
    answer = await client.completions.create(
        model="default", prompt=prompt, **{"temperature": 0, "max_tokens": MAX_TOKENS} | fields
    )
    assert answer.usage is not None
    [choice] = answer.choices
    return Answer(choice.text, choice.finish_reason, answer.usage.completion_tokens)


async def complete_streamed(client: AsyncOpenAI, prompt: list[int], **fields: Any) -> Answer:
    stream = await client.completions.create(
        model="default",
        prompt=prompt,
        stream=True,
        stream_options={"include_usage": True},
        **{"temperature": 0, "max_tokens": MAX_TOKENS} | fields,
    )
    text, reason, count = "", "", 0
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
    return Answer(text, reason, count)


async def sample_noise(client: AsyncOpenAI, number: int, prompt: list[int]) -> Answer:
    """A neighbour that samples wildly for as long as greedy requests run."""
    return await complete(
        client,
        prompt[: 8 + number],
        temperature=1.5,
        max_tokens=MAX_TOKENS + 16,
        extra_body={"ignore_eos": True, "top_k": number % 5 * 10, "repetition_penalty": 1 + number % 3 / 10},
    )


def all_at_once(server: ServerProcess, *makers: Callable[[AsyncOpenAI], Awaitable[Answer]]) -> list[Answer]:
    """Run requests together on one client; answers in the order asked."""

    async def run() -> list[Answer]:
        async with connect_async(server, timeout=300.0) as client:
            return await asyncio.gather(*(make(client) for make in makers))

    return asyncio.run(run())


def test_the_demo_question(smollm2):
    with connect(smollm2) as client:
        fields: dict[str, Any] = {"model": "default", "messages": user(QUESTIONS[0]), "temperature": 0}
        answer = client.chat.completions.create(**fields)
        chunks = list(client.chat.completions.create(**fields, stream=True))
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == "The capital of France is Paris."


def test_greedy_alone_is_mlx_lm_token_for_token(smollm2, references):
    for reference in references:
        [answer] = all_at_once(smollm2, partial(complete, prompt=reference.prompt))
        assert answer == reference.answer
    with connect(smollm2) as client:
        answer = client.completions.create(
            model="default", prompt=references[1].prompt, temperature=0, max_tokens=MAX_TOKENS, logprobs=1
        )
    assert answer.choices[0].logprobs.tokens[: len(references[1].tokens)] == references[1].tokens


def test_streamed_is_not_streamed(smollm2, references):
    asked = [partial(complete_streamed, prompt=reference.prompt) for reference in references]
    assert all_at_once(smollm2, *asked) == [reference.answer for reference in references]


def test_greedy_among_others_that_sample_is_greedy_alone(smollm2, references):
    noise = [
        partial(sample_noise, number=number, prompt=references[-1].prompt)
        for number in range(BATCH - len(references))
    ]
    greedy = [partial(complete, prompt=reference.prompt) for reference in references]
    answers = all_at_once(smollm2, *noise, *greedy)
    assert answers[len(noise) :] == [reference.answer for reference in references]


def test_a_seeded_sample_is_the_same_alone_and_among_others(smollm2, references):
    seeded = partial(complete, prompt=references[1].prompt, temperature=1.0, seed=11)
    [alone] = all_at_once(smollm2, seeded)
    noise = [
        partial(sample_noise, number=number, prompt=references[-1].prompt) for number in range(BATCH // 2)
    ]
    assert all_at_once(smollm2, *noise, seeded)[-1] == alone
    assert alone != references[1].answer


def test_a_pool_so_small_that_it_preempts_changes_nothing(start, references):
    # Four of the short prompts fit, and then there is a block left for all of them to grow into.
    short = [reference for reference in references[:4] if reference.answer.finish_reason == "length"]
    prompt_blocks = [-(-len(reference.prompt) // 4) for reference in short]
    num_blocks = 1 + 4 * max(prompt_blocks) + 1
    server = start({"model": {"path": "demo:smollm2"}, "cache": {"num_blocks": num_blocks, "block_size": 4}})
    asked = short * 3
    answers = all_at_once(server, *(partial(complete, prompt=reference.prompt) for reference in asked))
    assert answers == [reference.answer for reference in asked]
    status = server.wait_idle()
    assert status["num_preempted"] > 0
    assert status["cache"]["used_blocks"] == 0


async def kill_midway(client: AsyncOpenAI, server: ServerProcess, num_requests: int) -> Answer:
    """SIGKILL for the worker while so many requests run, and some have tokens."""
    seen: list[list[tuple[str, int]]] = []
    async with httpx.AsyncClient(base_url=server.url) as http:
        while True:
            status = (await http.get("/v1/status")).json()
            seen.append([(r["phase"], r["completion_tokens"]) for r in status["requests"]])
            tokens = [count for phase, count in seen[-1] if phase != "queued"]
            if len(tokens) >= num_requests and max(tokens) >= 2:
                break
            assert any(seen[-1]) or not any(map(any, seen)), f"not seen together: {seen[-200::10]}"
            await asyncio.sleep(0.01)
    os.kill(status["worker"]["pid"], signal.SIGKILL)
    return Answer("", "", max(tokens))


def test_a_workers_death_changes_nothing(smollm2):
    """Seeded, penalised, held to a grammar, streamed or not: all go on as if nothing had been."""
    prompt = list(range(1000, 1020))
    penalised = {"seed": 5, "temperature": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.5}
    asked = [
        partial(complete, prompt=prompt, max_tokens=64),
        partial(complete_streamed, prompt=prompt, max_tokens=64, seed=11, temperature=1.0),
        partial(complete, prompt=prompt, max_tokens=64, **penalised),
        partial(complete, prompt=prompt, max_tokens=64, extra_body={"guided_regex": "[a-z ]{200,240}"}),
    ]
    undisturbed = all_at_once(smollm2, *asked)
    before = smollm2.status()["worker"]
    kill = partial(kill_midway, server=smollm2, num_requests=len(asked))
    *disturbed, killed = all_at_once(smollm2, *asked, kill)
    assert killed.num_tokens < 64, "the worker died after the answers"
    assert disturbed == undisturbed
    after = smollm2.wait_idle()["worker"]
    assert after["restarts"] == before["restarts"] + 1
    assert after["resumed_requests"] == before["resumed_requests"] + len(asked)
