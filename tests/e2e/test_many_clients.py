"""Many clients at once, by the async SDK: each gets their own text, and those who leave leave nothing."""

from __future__ import annotations

import asyncio
import random

import openai
import pytest
from openai import AsyncOpenAI

from bench.serve.__main__ import main as serve_bench
from bench.soak import main as soak_bench
from tests.e2e.sdk import connect_async, played, user

NUM_CLIENTS = 64


def own_text(number: int) -> str:
    rng = random.Random(number)
    return f"client {number}: " + "".join(rng.choices("abc äöü 日本語 🙂\n", k=rng.randrange(20, 200)))


async def streamed(client: AsyncOpenAI, text: str) -> str:
    stream = await client.chat.completions.create(model="default", messages=user(played(text)), stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_64_clients_each_get_exactly_their_own_text(playback):
    async def one(number: int) -> tuple[str, str]:
        async with connect_async(playback) as client:
            text = own_text(number)
            if number % 2:
                return await streamed(client, text), text
            answer = await client.chat.completions.create(model="default", messages=user(played(text)))
            return answer.choices[0].message.content or "", text

    async def everyone() -> list[tuple[str, str]]:
        return await asyncio.gather(*(one(number) for number in range(NUM_CLIENTS)))

    for got, text in asyncio.run(everyone()):
        assert got == text


def test_clients_that_leave_free_what_they_held(slow_playback):
    """Half leave in the middle of a stream of ten seconds, the rest get all of a short one."""

    async def leave(client: AsyncOpenAI, after: int) -> None:
        stream = await client.chat.completions.create(
            model="default", messages=user(played("x" * 1000)), stream=True
        )
        async for _ in stream:
            after -= 1
            if after <= 0:
                await stream.close()
                return

    async def everyone() -> list[str]:
        async with connect_async(slow_playback) as client:
            stayed = [streamed(client, f"number {i}") for i in range(16)]
            *_, answers = await asyncio.gather(
                *(leave(client, i) for i in range(16)), asyncio.gather(*stayed)
            )
            return answers

    assert asyncio.run(everyone()) == [f"number {i}" for i in range(16)]
    status = slow_playback.wait_idle(3.0)
    assert status["cache"]["used_blocks"] == 0
    assert status["finish_reasons"]["abort"] >= 16


def test_a_client_that_leaves_before_a_whole_answer_is_noticed(slow_playback):
    async def impatient() -> None:
        async with connect_async(slow_playback) as client:
            request = asyncio.create_task(
                client.chat.completions.create(model="default", messages=user(played("x" * 1000)))
            )
            while not slow_playback.status()["num_running"]:
                await asyncio.sleep(0.01)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    asyncio.run(impatient())
    slow_playback.wait_idle(3.0)


def test_a_request_can_be_cancelled_by_its_id(slow_playback):
    async def cancelled() -> None:
        async with connect_async(slow_playback) as client:
            stream = await client.chat.completions.create(
                model="default", messages=user(played("x" * 1000)), stream=True
            )
            chunk = await anext(stream)
            reply = await client.post(f"/requests/{chunk.id}/cancel", cast_to=dict[str, object])
            assert reply["cancelled"] is True
            with pytest.raises(openai.APIError, match="cancelled"):
                async for _ in stream:
                    pass
            with pytest.raises(openai.NotFoundError):
                await client.post(f"/requests/{chunk.id}/cancel", cast_to=dict[str, object])

    asyncio.run(cancelled())


def test_the_load_generator_reports_no_error(playback, tmp_path):
    out = tmp_path / "result.json"
    command = ["--url", playback.url, "--requests", "60", "--output-tokens", "20", "--out", str(out)]
    command += ["--prompt-tokens", "uniform:50:100"]
    assert serve_bench([*command, "--concurrency", "16"]) == 0
    assert b'"output_tokens": 1200' in out.read_bytes()
    assert serve_bench([*command, "--rate", "200", "--api", "completions", "--no-keep-alive"]) == 0


def test_a_short_soak_leaves_nothing():
    assert soak_bench(["--requests", "300", "--concurrency", "16", "--token-rate", "1000"]) == 0
