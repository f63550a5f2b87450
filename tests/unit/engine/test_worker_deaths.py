"""The engine over workers that die: whose answers go on, whose do not, and who waits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from mlxd.config import SchedulerConfig
from mlxd.engine import scheduler, supervisor
from mlxd.engine.request import FinishReason
from mlxd.engine.worker_deaths import MAX_LOST_WORKERS, MAX_WORKER_DEATHS
from mlxd.errors import (
    ConfigError,
    NotReadyError,
    WorkerError,
)
from mlxd.step import WorkerFailure
from tests.unit.engine.asking import ask, collect, endless, prompt_of, run
from tests.unit.engine.fake_worker import FakeWorker, generate
from tests.wire.harness import settle

Harness = Callable[..., Any]


def test_a_worker_that_cannot_be_started_is_tried_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_SECONDS", (0.0,))
    start, errors = FakeWorker.start, [BlockingIOError(11, "Resource temporarily unavailable")]

    async def start_later(self: FakeWorker) -> None:
        if errors:
            raise errors.pop()
        await start(self)

    async def main() -> None:
        async with harness() as h:
            monkeypatch.setattr(FakeWorker, "start", start_later)
            h.worker.die()
            await h.until(lambda: len(h.workers) == 3)
            await h.until(h.is_ready)
            assert h.engine.health() == (True, "ok")

    run(main())


def test_answers_go_on_after_their_workers_death(harness: Harness) -> None:
    """With the same tokens, greedy or seeded, whatever was in flight: running, in prefill or waiting."""
    prompts = {"greedy": ([3, 4], None), "seeded": ([5, 6], 7), "long": ([n % 60 + 2 for n in range(40)], 9)}

    async def main() -> None:
        config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=16)
        async with harness(config, num_blocks=200) as h:
            first = h.engine.submit([ask("first", [9, 8], 60, ignore_eos=True)])
            await h.until(lambda: len(h.engine.requests()[0].output_token_ids) >= 5)
            streams = [
                h.engine.submit([ask(name, prompt, 60, seed=seed, ignore_eos=True)])
                for name, (prompt, seed) in prompts.items()
            ]
            await h.until(lambda: len(h.engine.scheduler.running) == 3)
            h.worker.die()
            await h.until(lambda: h.engine.scheduler is None)
            with pytest.raises(NotReadyError, match="restarting"):
                h.engine.submit([ask("early", [3])])
            assert not h.engine.health()[0]
            outputs = [(await collect(stream))[0] for stream in (first, *streams)]
            wanted = [endless([9, 8], 60), *(endless(p, 60, s or 0) for p, s in prompts.values())]
            assert [output.token_ids for output in outputs] == wanted
            assert {output.finish_reason for output in outputs} == {FinishReason.LENGTH}
            assert [output.num_output_tokens for output in outputs] == [60] * 4
            assert len(h.workers) == 2 and h.engine.health() == (True, "ok")
            assert h.engine.stats.num_resumed == 3
            assert h.engine.stats.num_output_tokens == 240

    run(main())


def test_any_moment_is_good_for_a_workers_death(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempted ones, samples in flight, prompts' log-probabilities half known: all recover."""
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_SECONDS", (0.0,))

    async def crowd(h: Any, deaths: int) -> list[list[int]]:
        rng = random.Random(5)
        streams = [
            h.engine.submit(
                [ask(f"r{n}", prompt_of(rng, 3 + n), 12, seed=n, ignore_eos=True, stop_token_ids=(n,))]
            )
            for n in range(2, 9)
        ]
        streams.append(h.engine.submit([ask("scored", [5] * 30, 6, prompt_logprobs=1, ignore_eos=True)]))
        reading = asyncio.gather(*(collect(stream) for stream in streams))
        if deaths:
            for _ in range(deaths):
                await asyncio.sleep(0)
            h.worker.die()
        results = [merged[0] for merged in await reading]
        scored = results[-1].prompt_logprobs
        assert scored is not None and len(scored) == 29
        assert all(result.error is None for result in results)
        return [result.token_ids for result in results]

    async def main() -> None:
        async with harness(SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=8), num_blocks=14) as h:
            undisturbed = await crowd(h, 0)
            for moment in range(1, 60, 3):
                assert await crowd(h, moment) == undisturbed, moment
                await h.until(h.is_ready)
                h.engine.supervisor._restarts.clear()
            assert h.engine.stats.num_resumed > 20

    run(main())


@pytest.mark.parametrize("max_admitted_tokens", [1000, 1])
def test_a_request_that_kills_workers_ends_and_spares_the_others(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, max_admitted_tokens: int
) -> None:
    """Those that the worker gave tokens are no suspects while another has had none. With the next worker all
    have had none, be it in one step or in two: then who was a suspect before is one again."""
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_SECONDS", (0.0,))
    monkeypatch.setattr(scheduler, "MAX_ADMITTED_TOKENS", max_admitted_tokens)
    send = FakeWorker.send

    def poisoned(self: FakeWorker, message: Any) -> None:
        if any(init.request_id == "poison" for init in getattr(message, "admit", ())):
            self.die()
        else:
            send(self, message)

    async def main() -> None:
        async with harness() as h:
            good = h.engine.submit([ask("good", [3, 4], 90, ignore_eos=True)])
            await h.until(lambda: len(h.engine.requests()[0].output_token_ids) >= 5)
            monkeypatch.setattr(FakeWorker, "send", poisoned)
            out = (await collect(h.engine.submit([ask("poison", [7] * 9, 9)])))[0]
            assert out.finish_reason is FinishReason.ERROR and isinstance(out.error, WorkerError)
            assert h.engine.supervisor.num_restarts == MAX_WORKER_DEATHS + 1
            assert (await collect(good))[0].token_ids == endless([3, 4], 90)

    run(main())


def test_a_client_that_left_may_be_to_blame(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            good = h.engine.submit([ask("good", [3, 4], 60, ignore_eos=True)])
            await h.until(lambda: len(h.engine.requests()[0].output_token_ids) >= 5)
            h.worker.hold = True
            poison = h.engine.submit([ask("poison", [7] * 9, 9)])
            await h.until(lambda: any(plan.admit for plan in h.worker.plans[-2:]))
            poison.cancel()
            [request] = h.engine.requests()
            h.worker.die()
            assert (await collect(good))[0].token_ids == endless([3, 4], 60)
            assert (request.num_worker_deaths, request.num_lost_workers) == (0, 1)

    run(main())


def test_a_worker_that_dies_idle_dies_of_nobody(harness: Harness) -> None:
    """One that reads too slowly waits with its blocks, but nothing of it is being computed."""

    async def main() -> None:
        async with harness() as h:
            stream = h.engine.submit([ask("slow", [3, 4], 60, ignore_eos=True)])
            [request] = h.engine.requests()
            await h.until(lambda: len(request.output_token_ids) >= 5)
            request.paused = True
            await h.until(lambda: request.num_pending_tokens == 0)
            assert request.slot >= 0
            h.worker.die()
            await h.until(lambda: len(h.workers) == 2)
            assert (request.num_worker_deaths, request.num_lost_workers) == (0, 0)
            request.paused = False
            assert (await collect(stream))[0].token_ids == endless([3, 4], 60)

    run(main())


def test_nobody_survives_any_number_of_deaths(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_SECONDS", (0.0,))

    async def main() -> None:
        async with harness() as h:
            stream = h.engine.submit([ask("a", [3, 4], 120, ignore_eos=True)])
            for number in range(1, MAX_WORKER_DEATHS + 2):
                known = len(h.engine.requests()[0].output_token_ids)
                await h.until(lambda known=known: len(h.engine.requests()[0].output_token_ids) > known)
                h.worker.die()
                await h.until(lambda number=number: len(h.workers) > number)
            out = (await collect(stream))[0]
            assert out.finish_reason is FinishReason.ERROR and isinstance(out.error, WorkerError)
            assert 0 < len(out.token_ids) < 120
            assert out.token_ids == endless([3, 4], len(out.token_ids))

    run(main())


def test_newcomers_do_not_shield_who_kills_workers(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each death somebody else is the suspect, because the worker had given them nothing yet."""
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_SECONDS", (0.0,))

    async def main() -> None:
        async with harness() as h:
            killer = h.engine.submit([ask("killer", [3, 4], 120, ignore_eos=True)])
            for number in range(1, MAX_LOST_WORKERS + 2):
                known = len(h.engine.requests()[0].output_token_ids)
                await h.until(lambda known=known: len(h.engine.requests()[0].output_token_ids) > known)
                newcomer = h.engine.submit([ask(f"new-{number}", [5, number], 3)])
                h.worker.die()
                await h.until(lambda number=number: len(h.workers) > number)
            out = (await collect(killer))[0]
            assert out.finish_reason is FinishReason.ERROR and isinstance(out.error, WorkerError)
            assert (await collect(newcomer))[0].error is None
            assert not h.failures

    run(main())


def test_waiting_for_the_next_worker(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            await h.engine.until_ready()
            h.worker.die()
            await h.until(lambda: not h.is_ready())
            await asyncio.gather(h.engine.until_ready(), h.engine.until_ready())
            assert len(h.workers) == 2
            out = (await collect(h.engine.submit([ask("a", [3, 4], 5)])))[0]
            assert out.token_ids == generate([3, 4], 5)
            h.worker.on_message(WorkerFailure("no such model", fatal=True))
            h.worker.die()
            await h.until(lambda: not h.is_ready())
            with pytest.raises(NotReadyError, match="could not be loaded"):
                await h.engine.until_ready()

    run(main())


@pytest.mark.parametrize(("stops", "words"), [(True, "shutting down"), (False, "could not be loaded")])
def test_nobody_waits_for_a_worker_that_will_not_come(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, stops: bool, words: str
) -> None:
    async def load_for_ever(self: FakeWorker) -> None:
        pass

    async def main() -> None:
        async with harness() as h:
            monkeypatch.setattr(FakeWorker, "start", load_for_ever)
            h.worker.die()
            await h.until(lambda: len(h.workers) == 2)
            waiting = asyncio.create_task(h.engine.until_ready())
            await asyncio.sleep(0)
            assert not waiting.done()
            if stops:
                await h.engine.stop(0)
            else:
                h.worker.on_message(WorkerFailure("no such model", fatal=True))
                h.worker.die()
            await h.until(waiting.done)
            with pytest.raises(NotReadyError, match=words):
                await waiting

    run(main())


def test_a_request_that_comes_as_its_worker_dies(harness: Harness) -> None:
    """Nothing of the old worker's plans it any more: it is the next one's."""

    async def main() -> None:
        async with harness() as h:
            stream = h.engine.submit([ask("a", [3, 4], 20)])
            h.worker.alive = False
            h.worker.on_exit(-9)
            assert (await collect(stream))[0].token_ids == generate([3, 4], 20)
            assert [len(worker.plans) > 0 for worker in h.workers] == [False, True]
            assert h.engine.stats.num_resumed == 0

    run(main())


def test_a_worker_that_dies_too_often_is_no_mistake_of_the_operators(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_SECONDS", (0.0,))

    async def main() -> None:
        async with harness() as h:
            for number in range(1, h.engine.config.worker.max_restarts + 1):
                h.worker.die()
                await h.until(lambda number=number: len(h.workers) > number)
            h.worker.die()
            await h.until(lambda: bool(h.failures))
            [failure] = h.failures
            assert isinstance(failure, WorkerError)

    run(main())


def test_who_comes_between_a_death_and_its_notice_is_no_suspect(harness: Harness) -> None:
    """The socket closes, and it takes a while until the process has ended. Who was there is the suspect."""

    async def main() -> None:
        async with harness() as h:
            h.worker.hold = True
            first = h.engine.submit([ask("first", [3, 4], 1)])  # one step: there is room for another
            await h.until(lambda: len(h.worker.plans) == 1)
            h.worker.alive = False
            late = h.engine.submit([ask("late", [5, 6], 20, ignore_eos=True)])
            await settle()
            there, newcomer = h.engine.requests()
            h.worker.on_exit(-11)
            assert (there.num_worker_deaths, there.num_lost_workers) == (1, 1)
            assert (newcomer.num_worker_deaths, newcomer.num_lost_workers) == (0, 0)
            assert (await collect(first))[0].token_ids == generate([3, 4], 1)
            assert (await collect(late))[0].token_ids == endless([5, 6], 20)

    run(main())


def test_fatal_failure_is_final(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            h.worker.on_message(WorkerFailure("no such model", fatal=True))
            h.worker.die()
            await h.until(lambda: bool(h.failures))
            [failure] = h.failures
            assert isinstance(failure, ConfigError) and str(failure) == "no such model"
            with pytest.raises(NotReadyError):
                h.engine.submit([ask("a", [3])])
            assert len(h.workers) == 1

    run(main())
