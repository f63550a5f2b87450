"""The prefix cache: cached equals not cached, whatever is shared, cut off, evicted or preempted.

The fake worker computes each token from what its cache holds at the places that the plan names, so a block
reused in the wrong place, too early or too late changes the answer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mlxd.config import CacheConfig, SchedulerConfig
from mlxd.engine.kv_manager import KvManager
from mlxd.engine.prefix_report import HitType, PrefixReport
from mlxd.engine.request import FinishReason, GenerationRequest, RequestOutput
from tests.unit.engine.asking import ask, collect, prompt_of, run, talkative
from tests.unit.engine.conversations import Agents
from tests.unit.engine.fake_worker import VOCAB_SIZE, generate, ints

Harness = Callable[..., Any]
BLOCK_SIZE = 4


def num_prefilled(h: Any) -> int:
    """Prompt tokens that plans have carried so far."""
    return sum(len(ints(plan.token_ids)) for plan in h.worker.plans)


async def answer(h: Any, name: str, prompt: list[int], max_tokens: int = 6, **fields: Any) -> RequestOutput:
    """One request from beginning to end; its tokens must be those of a lone one without a cache."""
    output = (await collect(h.engine.submit([ask(name, prompt, max_tokens, **fields)])))[0]
    expected = generate(prompt, max_tokens, fields.get("seed", 0))
    assert output.token_ids[: len(expected)] == expected, name
    assert len(output.token_ids) == max_tokens if fields.get("ignore_eos") else len(expected)
    return output


def report_of(h: Any, name: str) -> PrefixReport:
    [ended] = h.engine.ended.find(name, None)
    return ended.prefix


def hit_type(h: Any, name: str) -> HitType:
    return report_of(h, name).hit.type


def check_answer(request: GenerationRequest, output: RequestOutput) -> None:
    """The tokens are those that the worker gives a lone request without a cache."""
    expected = generate(request.prompt_token_ids, request.max_tokens, request.seed or 0)
    assert output.token_ids == expected[: len(output.token_ids)], request.request_id
    if output.finish_reason is FinishReason.ERROR:
        assert "told to fail" in str(output.error)
    elif output.finish_reason is not FinishReason.ABORT:
        assert len(output.token_ids) == len(expected), request.request_id


def agents_of(h: Any, seed: int, pause: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)) -> Agents:
    """Conversations with the harness's engine; its workers fail those that are to fail."""

    def fail(request: GenerationRequest) -> GenerationRequest:
        h.worker.fail_rows.add(request.request_id)
        return request

    return Agents(
        h.engine, seed=seed, max_len=100, vocab_size=VOCAB_SIZE, check=check_answer, fail=fail, pause=pause
    )


async def talk(h: Any, agents: Agents, num_conversations: int) -> None:
    """They have answers of every kind, under pressure, and leave nothing."""
    await agents.talk(num_conversations)
    kv, stats = h.engine.scheduler.kv, h.engine.stats
    assert h.engine.requests() == [] and kv.num_used_blocks == 0
    assert kv.num_evicted_blocks > num_conversations
    assert h.engine.scheduler.num_preemptions > 0
    assert stats.num_cached_tokens > stats.num_prompt_tokens / 10
    assert set(stats.prefix_hits) == set(HitType)
    assert agents.num_answers > agents.num_left > 0 and agents.num_failed > 0


async def crowd(make: Harness, seed: int, num_conversations: int) -> None:
    """Conversations, eight at a time, over a pool that holds about three of them."""
    config = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=(7, 24, 2048)[seed % 3])
    async with make(config, num_blocks=28, max_model_len=100) as h:
        await talk(h, agents_of(h, seed), num_conversations)
        assert any(plan.copy_blocks for plan in h.worker.plans)


@pytest.mark.parametrize("seed", range(3))
def test_cached_equals_not_cached(harness: Harness, seed: int) -> None:
    run(crowd(harness, seed, 100))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_cached_equals_not_cached_in_two_thousand_conversations(harness: Harness, seed: int) -> None:
    run(crowd(harness, seed, 200))


def test_hit_types(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            prompt = talkative(6) * 5  # ten tokens
            assert len(prompt) == 10
            reply = (await answer(h, "first", prompt)).token_ids
            assert hit_type(h, "first") is HitType.MISS
            assert (await answer(h, "again", prompt)).num_cached_tokens == 9
            assert hit_type(h, "again") is HitType.EXACT
            # The last sampled token was never computed.
            known = prompt + reply[:-1]
            assert (await answer(h, "next turn", [*known, reply[-1], 2, 3])).num_cached_tokens == len(known)
            assert hit_type(h, "next turn") is HitType.PREFIX
            assert (await answer(h, "beginning", prompt[:7])).num_cached_tokens == 6
            assert hit_type(h, "beginning") is HitType.SUPERSEQUENCE
            other = [*prompt[:6], prompt[6] ^ 1, 9, 9, 9]
            assert (await answer(h, "parts inside a block", other)).num_cached_tokens == 6
            assert hit_type(h, "parts inside a block") is HitType.LCP
            assert (await answer(h, "one token", prompt[:1])).num_cached_tokens == 0
            assert hit_type(h, "one token") is HitType.MISS
            assert h.engine.stats.prefix_hits == {
                "miss": 2,
                "exact": 1,
                "prefix": 1,
                "supersequence": 1,
                "lcp": 1,
            }

    run(main())


def test_a_second_identical_request_computes_one_token(harness: Harness) -> None:
    async def main() -> None:
        async with harness(num_blocks=100, max_model_len=300) as h:
            for length in range(33, 41):
                prompt = prompt_of(random.Random(length), length)
                await answer(h, f"{length} first", prompt, 1)
                before = num_prefilled(h)
                assert (await answer(h, f"{length} second", prompt, 1)).num_cached_tokens == length - 1
                assert num_prefilled(h) == before + 1

    run(main())


def test_requests_that_arrive_together_compute_a_shared_prefix_once(harness: Harness) -> None:
    async def main() -> None:
        config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64)
        async with harness(config, num_blocks=400, max_model_len=300) as h:
            prefix = prompt_of(random.Random(1), 200)
            prompts = [[*prefix, 2 + i, 3] for i in range(10)]
            await asyncio.gather(*(answer(h, f"r{i}", prompt) for i, prompt in enumerate(prompts)))
            assert num_prefilled(h) == 202 + 9 * 2

    run(main())


def test_prompts_that_begin_alike_are_compared(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with each would take the loop longer than to plan the step."""
    compared: list[int] = []
    soon_cached = KvManager.tokens_soon_cached

    def spy(self: KvManager, request: Any, match: Any, others: Any) -> int:
        others = list(others)
        compared.append(len(others))
        return soon_cached(self, request, match, others)

    monkeypatch.setattr(KvManager, "tokens_soon_cached", spy)

    async def main() -> None:
        async with harness(SchedulerConfig(max_num_seqs=32), num_blocks=200) as h:
            prompts = [[2 + n] * 9 for n in range(20)]
            await asyncio.gather(*(answer(h, f"{n}", prompt, 1) for n, prompt in enumerate(prompts)))
            assert compared == []
            prompts = [[7, 8, 9, 10, 2 + n, 3] for n in range(2)]
            await asyncio.gather(*(answer(h, f"alike-{n}", prompt, 1) for n, prompt in enumerate(prompts)))
            assert compared == [1]

    run(main())


def test_choices_share_the_prompts_blocks(harness: Harness) -> None:
    async def main() -> None:
        async with harness(num_blocks=100, max_model_len=300) as h:
            prompt = prompt_of(random.Random(2), 101)
            stream = h.engine.submit(
                [ask(f"n-{i}", prompt, 30, index=i, seed=i, ignore_eos=True) for i in range(4)]
            )
            await h.until(lambda: len(h.engine.scheduler.running) == 4)
            # 25 blocks of the prompt, and each choice's own last one.
            assert h.engine.scheduler.kv.num_used_blocks <= 25 + 4 * 2
            await collect(stream)
            assert num_prefilled(h) == 101 + 3 * 1

    run(main())


def test_a_cancelled_prefill_is_kept(harness: Harness) -> None:
    async def main() -> None:
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16)
        async with harness(config, num_blocks=100, max_model_len=300) as h:
            prompt = prompt_of(random.Random(3), 100)
            stream = h.engine.submit([ask("leaves", prompt, 5)])
            await h.until(lambda: len(h.worker.plans) == 3)
            stream.cancel()
            await collect(stream)
            assert (await answer(h, "comes back", prompt)).num_cached_tokens == 16 * len(h.worker.plans[:3])

    run(main())


def test_a_preempted_request_finds_its_work_again(harness: Harness) -> None:
    async def main() -> None:
        async with harness(SchedulerConfig(max_num_seqs=2), num_blocks=21) as h:
            prompts = [prompt_of(random.Random(seed), 20) for seed in (1, 2)]
            answers = [answer(h, f"{i}", p, 30, ignore_eos=True) for i, p in enumerate(prompts)]
            outputs = await asyncio.gather(*answers)
            assert h.engine.scheduler.num_preemptions == 1
            assert [len(output.token_ids) for output in outputs] == [30, 30]
            # Far fewer than a second time everything.
            assert num_prefilled(h) < 40 + 30

    run(main())


def test_what_failed_is_not_reused(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            head = prompt_of(random.Random(4), 8)
            await answer(h, "good", head)
            h.worker.fail_rows.add("bad")
            prompt = [*head, *prompt_of(random.Random(5), 20)]
            output = (await collect(h.engine.submit([ask("bad", prompt)])))[0]
            assert output.finish_reason is FinishReason.ERROR
            again = await answer(h, "again", prompt)
            assert again.num_cached_tokens == 8, "what others computed stays, what it computed does not"

    run(main())


def test_salts_share_nothing(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            prompt = prompt_of(random.Random(6), 30)
            await answer(h, "alice", prompt, cache_salt="alice")
            assert (await answer(h, "bob", prompt, cache_salt="bob")).num_cached_tokens == 0
            assert hit_type(h, "bob") is HitType.MISS
            assert report_of(h, "bob").cached == ()
            assert (await answer(h, "nobody", prompt)).num_cached_tokens == 0
            assert (await answer(h, "alice again", prompt, cache_salt="alice")).num_cached_tokens == 29

    run(main())


def test_a_conversation_may_fill_the_pool_to_the_last_block(harness: Harness) -> None:
    """Also when the hit takes over a partly filled block: it is not counted twice."""

    async def main() -> None:
        async with harness(num_blocks=9, max_model_len=32) as h:
            rng = random.Random(7)
            history = prompt_of(rng, 5)
            while len(history) < 31:
                await answer(h, f"{len(history)}", history, 1)
                history = [*history, *prompt_of(rng, 2)]
            assert (await answer(h, "last", history[:31], 1)).num_cached_tokens >= 28

    run(main())


def test_nothing_is_shared_where_the_worker_cannot(harness: Harness) -> None:
    async def main() -> None:
        for options in ({"shares_prefixes": False}, {"cache": CacheConfig(prefix_caching=False)}):
            async with harness(**options) as h:
                prompt = prompt_of(random.Random(8), 30)
                for name in ("first", "second"):
                    assert (await answer(h, name, prompt)).num_cached_tokens == 0
                    assert hit_type(h, name) is HitType.MISS
                kv = h.engine.scheduler.kv
                assert kv.num_cached_blocks == 0 and kv.pool.num_used == 0

    run(main())


def test_a_new_worker_starts_with_an_empty_cache(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            prompt = prompt_of(random.Random(9), 30)
            await answer(h, "first", prompt)
            h.worker.die()
            await h.until(lambda: len(h.workers) == 2 and h.is_ready())
            assert (await answer(h, "second", prompt)).num_cached_tokens == 0
            assert (await answer(h, "third", prompt)).num_cached_tokens == 29

    run(main())
