"""Prefixes of models with recurrent state: cached equals not cached, and how much is reused.

The fake worker keeps the tokens that each state has seen and compares them with those of the blocks, so a
state that is loaded in the wrong place, too early or too late fails the step.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from mlxd.config import SchedulerConfig
from mlxd.engine.prefix_report import Cause, HitType
from mlxd.engine.request import FinishReason
from mlxd.engine.snapshots import MIN_BLOCKS, PROGRESS_BLOCKS, TAIL_TOKENS, Snapshots
from mlxd.errors import InvalidRequestError
from tests.unit.engine.asking import ask, collect, endless, prompt_of, run
from tests.unit.engine.fake_worker import generate, ints
from tests.unit.engine.test_prefix_cache import agents_of, answer, hit_type, num_prefilled, report_of, talk
from tests.unit.engine.test_thinking import generate as thinking
from tests.unit.engine.test_thinking import think

Harness = Callable[..., Any]
BLOCK_SIZE = 4


async def crowd(make: Harness, seed: int, num_conversations: int) -> None:
    """As the prefix cache's, with states for a few of the conversations that the pool holds."""
    config = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=(7, 24, 2048)[seed % 3])
    async with make(config, num_blocks=28, max_model_len=100, num_snapshots=(1, 5, 12)[seed % 3]) as h:
        tell_costs(h)
        await talk(h, agents_of(h, seed), num_conversations)
        assert any(plan.load_states for plan in h.worker.plans)
        assert not any(plan.copy_blocks for plan in h.worker.plans)


@pytest.mark.parametrize("seed", range(3))
def test_cached_equals_not_cached(harness: Harness, seed: int) -> None:
    run(crowd(harness, seed, 100))


def last_state(length: int) -> int:
    """Where the last one of a prompt that is answered is kept."""
    return (length - 1 - TAIL_TOKENS) // BLOCK_SIZE * BLOCK_SIZE


def tell_costs(h: Any, seconds_per_token: float = 1e-3) -> None:
    """What tokens of a prompt take, beside a millisecond a step, and what the scheduler knows of it."""
    h.worker.seconds_per_token = seconds_per_token
    for _ in range(20):
        h.engine.scheduler.cost.observe(1, 0, 1e-3)
        h.engine.scheduler.cost.observe(0, 100, 100 * seconds_per_token)


def play(harness: Harness, scenario: Callable[[Any, random.Random], Any], **options: Any) -> None:
    async def main() -> None:
        async with harness(**{"num_snapshots": 8, "num_blocks": 200, **options}) as h:
            tell_costs(h)
            await scenario(h, random.Random(3))

    run(main())


def test_a_conversation_goes_on_where_its_last_prompt_ended(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        history = prompt_of(rng, 30)
        kept = 0
        for turn in range(4):
            assert (await answer(h, f"{turn}", history)).num_cached_tokens == kept
            kept = last_state(len(history))
            history = [*history, *prompt_of(rng, 22)]  # the answer, otherwise than it was given, and more
        assert report_of(h, "1").hit.cause is Cause.NO_STATE
        assert hit_type(h, "1") is HitType.PREFIX

    play(harness, scenario)


def test_what_asks_for_an_answer_need_not_come_again(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt, asking = prompt_of(rng, 40), prompt_of(rng, TAIL_TOKENS)
        await answer(h, "first", [*prompt, *asking])
        cached = (await answer(h, "next", [*prompt, *prompt_of(rng, 20)])).num_cached_tokens
        assert cached == last_state(48) >= 40 - BLOCK_SIZE

    play(harness, scenario)


def test_the_same_prompt_again_and_one_that_goes_on(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 50)
        await answer(h, "first", prompt)
        assert (await answer(h, "again", prompt)).num_cached_tokens == last_state(50)
        assert hit_type(h, "again") is HitType.EXACT and report_of(h, "again").hit.cause is None
        begin = prompt[: last_state(50) + 1 + TAIL_TOKENS]
        assert (await answer(h, "beginning", begin)).num_cached_tokens == last_state(50)
        assert hit_type(h, "beginning") is HitType.SUPERSEQUENCE
        assert (await answer(h, "salted", prompt, cache_salt="another's")).num_cached_tokens == 0
        assert h.engine.cache_status()["hit_types"]["exact"] == 1

    play(harness, scenario)


def test_what_two_had_in_common_the_third_reuses(harness: Harness) -> None:
    """Conversations under one system prompt, which ends within a block."""

    async def scenario(h: Any, rng: random.Random) -> None:
        system = prompt_of(rng, 50)
        prompts = [[*system, number + 2, *prompt_of(rng, 25)] for number in range(4)]
        cached = [
            (await answer(h, f"{number}", prompt)).num_cached_tokens for number, prompt in enumerate(prompts)
        ]
        assert cached == [0, 0, 48, 48]
        assert report_of(h, "1").hit.cause is Cause.NO_STATE
        assert report_of(h, "2").hit.cause is Cause.DIVERGED and hit_type(h, "2") is HitType.LCP
        assert report_of(h, "2").cached[:2] == tuple(system[48:])

    play(harness, scenario)


def test_the_second_conversation_reuses_an_opening_that_is_known(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        system = prompt_of(rng, 50)
        for number, expected in enumerate((0, 48, 48)):
            prompt = [*system, number + 2, *prompt_of(rng, 30)]
            output = await answer(h, f"{number}", prompt, num_opening_tokens=50)
            assert output.num_cached_tokens == expected
            assert (await answer(h, f"{number} again", prompt)).num_cached_tokens == last_state(81)
        short = await answer(h, "short", [*system, 9], num_opening_tokens=50)
        assert short.num_cached_tokens == 48

    play(harness, scenario)


def test_short_prompts_cost_no_chunk_of_their_own(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        length = MIN_BLOCKS * BLOCK_SIZE + TAIL_TOKENS
        await answer(h, "short", prompt_of(rng, length), 1)
        assert len(h.worker.plans) == 1 and not h.worker.plans[0].save_states
        await answer(h, "long", prompt_of(rng, length + 1), 1)
        assert [len(plan.save_states) for plan in h.worker.plans[1:]] == [1, 0]

    play(harness, scenario)


def test_nothing_is_cut_where_a_step_takes_longer_than_to_compute_it_again(harness: Harness) -> None:
    """As on a GPU. A state of the answer is kept all the same."""

    async def scenario(h: Any, rng: random.Random) -> None:
        tell_costs(h, 1e-6)
        prompt = prompt_of(rng, 61)
        await collect(h.engine.submit([ask("first", prompt, 8, ignore_eos=True)]))
        first, *others = h.worker.plans
        assert len(ints(first.token_ids)) == 61 and not first.save_states
        assert [len(plan.save_states) for plan in others].count(1) == 1
        history = [*prompt, *endless(prompt, 8)]
        assert (await answer(h, "next", [*history, 5, 6])).num_cached_tokens == 64
        # What is computed ahead is computed for its state alone.
        ahead = prompt_of(rng, 21)
        await h.engine.submit([ask("ahead", ahead, 0, background=True)]).drain()
        assert (await answer(h, "asked", [*ahead, 7])).num_cached_tokens == 20

    play(harness, scenario)


def test_what_a_cut_leaves_does_not_make_tokens_look_dear(harness: Harness) -> None:
    """80 tokens of a prompt take 9 ms, the 24 behind the cut 3.4 ms, most of all a step's fixed cost."""

    async def scenario(h: Any, rng: random.Random) -> None:
        tell_costs(h, 1e-4)
        for number in range(8):
            await collect(h.engine.submit([ask(f"{number}", prompt_of(rng, 104), 2)]))
        lengths = [len(ints(plan.token_ids)) for plan in h.worker.plans if plan.token_ids]
        assert lengths == [80, 24] * 8
        assert h.engine.scheduler.cost._seconds_per_token <= 9e-3 / 80

    play(harness, scenario, block_size=16)


def test_choices_compute_their_prompt_once(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 90)
        outputs = await collect(
            h.engine.submit([ask(f"n-{i}", prompt, 6, index=i, seed=i) for i in range(3)])
        )
        for index in range(3):
            assert outputs[index].token_ids == generate(prompt, 6, index)
        assert num_prefilled(h) == 90 + 2 * (90 - last_state(90))

    play(harness, scenario)


def test_an_answer_that_comes_back_as_it_was_is_mostly_reused(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 20)
        await collect(h.engine.submit([ask("first", prompt, 80, ignore_eos=True)]))
        history = [*prompt, *endless(prompt, 80)]
        saves = [plan.save_states for plan in h.worker.plans if plan.save_states]
        assert len(saves) == 100 // (PROGRESS_BLOCKS * BLOCK_SIZE)
        assert h.engine.cache_status()["snapshots"] == 1  # a later one takes the earlier one's place
        assert (await answer(h, "next", [*history, 5, 6])).num_cached_tokens == 96

    play(harness, scenario)


def test_a_request_that_is_preempted_goes_on_near_where_it_was(harness: Harness) -> None:
    """Two that do not fit together: none computes its prompt again."""

    async def scenario(h: Any, rng: random.Random) -> None:
        prompts = [prompt_of(rng, 60) for _ in range(2)]
        asked = [ask(f"{i}", prompt, 60, index=i, ignore_eos=True) for i, prompt in enumerate(prompts)]
        outputs = await collect(h.engine.submit(asked))
        for index, prompt in enumerate(prompts):
            assert outputs[index].token_ids == endless(prompt, 60)
        assert h.engine.num_preemptions > 0
        assert num_prefilled(h) < 120 + h.engine.num_preemptions * (PROGRESS_BLOCKS + 8) * BLOCK_SIZE

    play(harness, scenario, num_blocks=50)


def test_a_prompt_that_is_given_up_midway_is_not_lost(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 100)
        h.worker.hold = True
        stream = h.engine.submit([ask("left", prompt, 4)])
        await h.until(lambda: len(h.worker.plans) == 2)
        stream.cancel()
        h.worker.release_held()
        await collect(stream)
        assert (await answer(h, "again", prompt)).num_cached_tokens >= PROGRESS_BLOCKS * BLOCK_SIZE

    play(harness, scenario, scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=38))


def test_nobody_begins_with_a_state_that_may_be_wrong(harness: Harness) -> None:
    """Of a request that failed, and the one that a request began with that failed."""

    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 50)
        h.worker.fail_rows.add("fails")
        for _ in range(2):
            [output] = (await collect(h.engine.submit([ask("fails", prompt, 4)]))).values()
            assert (output.finish_reason, output.num_cached_tokens) == (FinishReason.ERROR, 0)
            assert h.engine.cache_status()["snapshots"] == 0
        await answer(h, "good", prompt)
        [output] = (await collect(h.engine.submit([ask("fails", prompt, 4)]))).values()
        assert output.num_cached_tokens == last_state(50)
        assert (await answer(h, "after", prompt)).num_cached_tokens == 0

    play(harness, scenario)


def test_a_state_that_a_token_followed_from_is_not_to_blame(harness: Harness) -> None:
    """A request that fails later takes nothing from others that began as it did, nor from pins."""

    async def scenario(h: Any, rng: random.Random) -> None:
        system = prompt_of(rng, 40)
        await h.engine.pins.pin("system", ask("pin", system, 0, client="me"), 60)
        prompt = [*system, *prompt_of(rng, 40)]
        ends = []
        async for outputs in h.engine.submit([ask("fails", prompt, 30, ignore_eos=True)]):
            h.worker.fail_rows.add("fails")
            ends += [(output.finish_reason, output.num_output_tokens > 0) for output in outputs]
        assert ends[0] == (None, True) and ends[-1] == (FinishReason.ERROR, True)
        assert h.engine.cache_status()["snapshots"] == 1
        assert (await answer(h, "after", prompt)).num_cached_tokens == 40

    play(harness, scenario)


def test_a_new_worker_has_none(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 50)
        await answer(h, "first", prompt)
        h.worker.die()
        await h.until(lambda: len(h.workers) == 2 and h.is_ready())
        tell_costs(h)
        assert (await answer(h, "second", prompt)).num_cached_tokens == 0
        assert (await answer(h, "third", prompt)).num_cached_tokens == last_state(50)

    play(harness, scenario)


def test_a_worker_that_dies_before_it_has_saved_leaves_nothing(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 50)
        h.worker.hold = True
        stream = h.engine.submit([ask("first", prompt, 4)])
        await h.until(lambda: any(plan.save_states for plan in h.worker.plans))
        h.worker.die()
        [output] = (await collect(stream)).values()
        assert output.token_ids == generate(prompt, 4)
        assert not h.worker.plans[0].load_states

    play(harness, scenario)


def test_the_cache_is_cleared_of_them(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 50)
        await answer(h, "first", prompt)
        assert h.engine.cache_status()["snapshots"] == 1 and h.engine.cache_status()["max_snapshots"] == 8
        assert await h.engine.clear_cache() > 0
        assert h.engine.cache_status()["snapshots"] == 0
        assert (await answer(h, "second", prompt)).num_cached_tokens == 0

    play(harness, scenario)


def test_a_pin_keeps_its_state_whatever_others_need(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        pins, prompt = h.engine.pins, prompt_of(rng, 41)
        pin = await pins.pin("a", ask("pin", prompt, 0, client="me"), 60)
        assert (pin.num_tokens, len(pin.block_ids)) == (40, 10)
        num_plans = len(h.worker.plans)
        with pytest.raises(InvalidRequestError, match="1 of the 2 that can be kept may be held") as error:
            await pins.pin("b", ask("pin", prompt_of(rng, 41), 0, client="me"), 60)
        assert error.value.code == "pin_quota_exceeded" and len(h.worker.plans) == num_plans
        assert (await pins.pin("a", ask("pin", prompt, 0, client="me"), 60)).num_tokens == 40
        for number in range(4):
            await answer(h, f"{number}", prompt_of(rng, 50))
        await h.engine.clear_cache()
        assert (await answer(h, "pinned", [*prompt, 4])).num_cached_tokens == 40
        pins.unpin("a", "me")
        for number in range(4):
            await answer(h, f"more {number}", prompt_of(rng, 50))
        assert (await answer(h, "let go", [*prompt, 4])).num_cached_tokens == 0

    play(harness, scenario, num_snapshots=2)


def test_a_prompt_that_is_only_scored_is_cut_like_others(harness: Harness) -> None:
    """It is computed for its log-probabilities, not for a state at its end."""

    async def scenario(h: Any, rng: random.Random) -> None:
        tell_costs(h, 1e-6)
        [output] = (
            await collect(h.engine.submit([ask("scored", prompt_of(rng, 30), 0, prompt_logprobs=0)]))
        ).values()
        assert len(output.prompt_logprobs) == 29 and len(h.worker.plans) == 1

    play(harness, scenario)


def test_what_is_computed_ahead_is_kept_at_its_end_and_when_it_gives_way(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        tell_costs(h, 3e-3)
        ahead, clients = prompt_of(rng, 96), prompt_of(rng, 20)
        h.worker.hold = True
        task = asyncio.create_task(h.engine.submit([ask("ahead", ahead, 0, background=True)]).drain())
        await h.until(lambda: any(plan.save_states for plan in h.worker.plans))
        asked = asyncio.create_task(answer(h, "client", clients))
        await h.until(lambda: len(h.engine.requests()) == 2)
        h.worker.release_held()
        await asyncio.gather(asked, task)
        assert sum(len(plan.load_states) for plan in h.worker.plans) == 1
        assert num_prefilled(h) < 96 + 20 + PROGRESS_BLOCKS * BLOCK_SIZE
        assert (await answer(h, "next turn", [*ahead, 7, 8])).num_cached_tokens == 96
        assert h.engine.num_cached_tokens([*ahead, 7, 8], "") == 96
        assert h.engine.num_cached_tokens(clients, "") == 0

    play(harness, scenario)


def test_logits_of_a_whole_prompt_leave_states_for_others(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompt = prompt_of(rng, 50)
        for name in ("first", "again"):
            output = await answer(h, name, prompt, prompt_logprobs=0)
            assert output.num_cached_tokens == 0
        assert (await answer(h, "other", prompt)).num_cached_tokens == last_state(50)

    play(harness, scenario)


def test_a_thought_that_is_cut_short_does_not_compute_its_prompt_again(harness: Harness) -> None:
    """The tokens that close it take the place of those in flight: no state of these is used."""

    async def scenario(h: Any, rng: random.Random) -> None:
        while True:
            prompt = prompt_of(rng, 40)
            expected, num_thinking = thinking(prompt, 50, 36, 0)
            if num_thinking >= 36 and len(expected) > 40:
                break
        output = (await collect(h.engine.submit([think("thinks", prompt, 50, 36, 0)])))[0]
        assert output.token_ids == expected and h.worker.plans[-1].step_id > 40
        assert any(plan.load_states for plan in h.worker.plans)
        assert num_prefilled(h) <= 40 + (PROGRESS_BLOCKS + 8) * BLOCK_SIZE

    play(harness, scenario)


def test_a_long_prompt_is_looked_up_by_states_not_by_blocks() -> None:
    """There are thousands of its blocks, and it is looked up for every step while it waits."""

    class Tokens:
        num_tokens = 40000
        num_looks = 0

        def block_hash(self, index: int) -> bytes:
            self.num_looks += 1
            return index.to_bytes(16, "little")

    states, tokens = Snapshots(8, BLOCK_SIZE), Tokens()
    for slot, position in enumerate((800, 4000, 20000)):
        states.begin(slot, None, (), position, answers=False)
        assert states.save(slot, position, tokens) == slot
        states.publish(slot, tokens, position)
    tokens.num_looks = 0
    for num_blocks, expected in (
        (10000, 5000),
        (4999, 1000),
        (1000, 1000),
        (200, 200),
        (199, None),
        (1, None),
    ):
        found = states.longest(tokens, num_blocks)
        assert (found and found.num_blocks) == expected
    assert tokens.num_looks < 20
    states.check_integrity()


def test_those_used_longest_ago_are_given_up(harness: Harness) -> None:
    async def scenario(h: Any, rng: random.Random) -> None:
        prompts = [prompt_of(rng, 50) for _ in range(4)]
        for number, prompt in enumerate(prompts[:3]):
            await answer(h, f"{number}", prompt)
        assert (await answer(h, "0 again", prompts[0])).num_cached_tokens == last_state(50)
        await answer(h, "3", prompts[3])
        cached = [h.engine.num_cached_tokens(prompt, "") for prompt in prompts]
        assert cached == [last_state(50), 0, last_state(50), last_state(50)]

    play(harness, scenario, num_snapshots=3)
