"""What the engine measures of itself: every gap, every wait, its speed, and what follows from it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from mlxd.config import SchedulerConfig
from mlxd.engine.stats import Speed
from mlxd.errors import OverloadedError
from tests.unit.engine.asking import ask, collect, run

Harness = Callable[..., Any]


def test_speed_forgets_by_half_every_ten_seconds() -> None:
    speed = Speed()
    assert speed.tokens_per_second == 0.0
    speed.observe(100, 1.0)
    assert speed.tokens_per_second == 100.0
    for _ in range(100):
        speed.observe(10, 1.0)
    assert speed.tokens_per_second == pytest.approx(10.0, rel=0.01)


def test_the_gaps_of_all_tokens_add_up_to_the_time_between_first_and_last(harness: Harness) -> None:
    """Whatever the steps were: requests come and go, wait, are preempted; time passes unevenly."""

    async def main() -> None:
        rng = random.Random(3)
        async with harness(SchedulerConfig(max_num_seqs=5), num_blocks=16) as h:
            spans: list[float] = []

            async def one(number: int) -> None:
                stream = h.engine.submit(
                    [ask(f"r{number}", [3 + number] * rng.randrange(1, 12), 20, ignore_eos=True)]
                )
                request = next(r for r in h.engine.requests() if r.request_id == f"r{number}")
                await collect(stream)
                spans.append(request.last_token_time - request.first_token_time)

            async def pass_time() -> None:
                while len(spans) < 15:
                    h.time += rng.choice([0.0, 0.125, 0.25, 4.0])
                    await asyncio.sleep(0)

            await asyncio.gather(pass_time(), *(one(n) for n in range(15)))
            stats = h.engine.stats
            assert h.engine.num_preemptions > 0
            assert stats.num_output_tokens == stats.output_tokens.total == 15 * 20
            assert sum(stats.itl_seconds.counts) == 15 * 19
            assert stats.itl_seconds.total == pytest.approx(sum(spans))
            assert stats.tpot_seconds.total == pytest.approx(sum(spans) / 19)
            for histogram in (stats.ttft_seconds, stats.queue_seconds, stats.e2e_seconds):
                assert sum(histogram.counts) == 15
            assert stats.queue_seconds.total + stats.prefill_seconds.total == pytest.approx(
                stats.ttft_seconds.total
            )
            assert sum(stats.step_rows.counts) == stats.num_steps == len(h.worker.plans)
            computed = sum(len(plan.slot_mapping) // 4 for plan in h.worker.plans)
            assert stats.step_tokens.total == computed

    run(main())


def test_those_who_give_up_in_the_queue_have_waited_too(harness: Harness) -> None:
    async def main() -> None:
        async with harness(SchedulerConfig(max_num_seqs=1)) as h:
            runs = h.engine.submit([ask("runs", [3], 9, ignore_eos=True)])
            waits = h.engine.submit([ask("waits", [3], 9)])
            await anext(aiter(runs))
            h.time += 30.0
            waits.cancel()
            stats = h.engine.stats
            assert stats.queue_seconds.total == 30.0 and sum(stats.queue_seconds.counts) == 2
            assert sum(stats.ttft_seconds.counts) == 1
            await collect(runs)

    run(main())


def test_preemptions_outlive_the_scheduler(harness: Harness) -> None:
    async def main() -> None:
        async with harness(num_blocks=14) as h:
            streams = [h.engine.submit([ask(f"r{i}", [3] * 6, 30, ignore_eos=True)]) for i in range(4)]
            await asyncio.gather(*(collect(stream) for stream in streams))
            before = h.engine.num_preemptions
            assert before > 0
            h.worker.die()
            await h.until(lambda: len(h.workers) == 2 and h.is_ready())
            assert h.engine.num_preemptions == (await h.engine.status())["num_preempted"] == before

    run(main())


@pytest.mark.parametrize(("seconds_per_token", "expected"), [(0.0001, 1), (0.0525, 9), (9.0, 120)])
def test_retry_after_is_the_waiting_tokens_by_the_speed_measured(
    harness: Harness, seconds_per_token: float, expected: int
) -> None:
    """Three requests wait, of 50 tokens each, and a request generates 1 on (running) average."""

    async def main() -> None:
        async with harness(SchedulerConfig(max_num_seqs=1, max_queue=3)) as h:
            await collect(h.engine.submit([ask("first", [3] * 30, 10, ignore_eos=True)]))
            speed = h.engine.stats.speed
            speed.tokens, speed.seconds = 1.0, seconds_per_token
            assert h.engine.stats.mean_output_tokens == 1.0
            h.worker.hold = True
            running = h.engine.submit([ask("running", [3] * 30, 10, ignore_eos=True)])
            await h.until(lambda: len(h.engine.scheduler.running) == 1)
            waiting = [h.engine.submit([ask(f"w{i}", [3] * 50, 10, ignore_eos=True)]) for i in range(3)]
            with pytest.raises(OverloadedError) as refusal:
                h.engine.submit([ask("late", [3])])
            assert int(refusal.value.headers["retry-after"]) == expected
            h.worker.release_held()
            for stream in (running, *waiting):
                await collect(stream)

    run(main())


def test_before_anything_was_measured_retry_after_is_a_second(harness: Harness) -> None:
    async def main() -> None:
        async with harness(SchedulerConfig(max_num_seqs=1, max_queue=1)) as h:
            h.worker.hold = True
            streams = [h.engine.submit([ask("running", [3], 1)])]
            await h.until(lambda: len(h.engine.scheduler.running) == 1)
            streams.append(h.engine.submit([ask("waiting", [3], 1)]))
            with pytest.raises(OverloadedError) as refusal:
                h.engine.submit([ask("late", [3])])
            assert refusal.value.headers["retry-after"] == "1"
            h.worker.release_held()
            for stream in streams:
                await collect(stream)

    run(main())
