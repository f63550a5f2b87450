"""Requests that end before their time: who leaves, is cancelled, waits too long, or is told to go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mlxd.config import SchedulerConfig
from mlxd.engine.request import FinishReason
from mlxd.errors import (
    GenerationTimeout,
    NotReadyError,
)
from tests.unit.engine.asking import ask, collect, run

Harness = Callable[..., Any]


def test_cancel_frees_blocks_before_the_next_plan(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            stays = h.engine.submit([ask("stays", [3, 4, 5], 40, ignore_eos=True)])
            leaves = h.engine.submit([ask("leaves", [6] * 30, 40, ignore_eos=True)])
            await anext(aiter(leaves))
            kv = h.engine.scheduler.kv
            used = kv.num_used_blocks
            num_plans = len(h.worker.plans)
            leaves.cancel()
            assert kv.num_used_blocks < used - 6
            leaves.cancel()
            last = [outputs async for outputs in leaves][-1]
            assert last[0].finish_reason is FinishReason.ABORT
            out = (await collect(stays))[0]
            assert len(out.token_ids) == 40
            released = [slot for plan in h.worker.plans[num_plans:] for slot in plan.release]
            assert len(released) >= 1

    run(main())


def test_the_beginning_of_an_id_is_no_id(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            stream = h.engine.submit([ask("chat-1f-0", [3] * 4, 90, ignore_eos=True)])
            await anext(aiter(stream))
            for name in ("chat", "chat-1", "cha", "chat-1f-", "chat-1f-00"):
                assert not h.engine.abort(name) and h.engine.describe_sequences(name) == []
            assert h.engine.abort("chat-1f")
            await collect(stream)
            assert h.engine.describe_sequences("chat") == []
            assert len(h.engine.describe_sequences("chat-1f")) == 1

    run(main())


def test_abort_by_id_takes_all_choices_and_waiting_ones(harness: Harness) -> None:
    async def main() -> None:
        async with harness(SchedulerConfig(max_num_seqs=1)) as h:
            stream = h.engine.submit([ask(f"x-{i}", [3] * 4, 90, index=i, ignore_eos=True) for i in range(3)])
            other = h.engine.submit([ask("xy", [3] * 4, 3, ignore_eos=True)])
            await anext(aiter(stream))
            assert h.engine.abort("x")
            assert not h.engine.abort("x")
            assert {o.finish_reason for o in (await collect(stream)).values()} == {FinishReason.ABORT}
            assert (await collect(other))[0].finish_reason is FinishReason.LENGTH

    run(main())


def test_abort_for_a_client_spares_those_of_others(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            stream = h.engine.submit([ask("a-0", [3], 90, ignore_eos=True, client="alice")])
            assert not h.engine.abort("a", "bob")
            assert h.engine.abort("a", "alice")
            assert (await collect(stream))[0].finish_reason is FinishReason.ABORT

    run(main())


def test_timeout_ends_with_its_error(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            h.worker.hold = True
            out = (await collect(h.engine.submit([ask("a", [3], 5, timeout_seconds=0.01)])))[0]
            assert out.finish_reason is FinishReason.ABORT
            assert isinstance(out.error, GenerationTimeout)
            h.worker.release_held()

    run(main())


def test_time_runs_since_the_request_arrived(harness: Harness) -> None:
    """Rendering and reading of its text came before."""

    async def main() -> None:
        async with harness() as h:
            h.worker.hold = True
            arrival = asyncio.get_running_loop().time() - 60
            request = ask("a", [3], 5, timeout_seconds=60.01)
            out = (await collect(h.engine.submit([request], timeout_from=arrival)))[0]
            assert isinstance(out.error, GenerationTimeout)
            assert "60.01 s" in str(out.error)
            h.worker.release_held()

    run(main())


def test_stop_gives_running_requests_a_last_output(harness: Harness) -> None:
    async def main() -> None:
        async with harness() as h:
            stream = h.engine.submit([ask("a", [3, 4], 50, ignore_eos=True)])
            await anext(aiter(stream))
            h.worker.hold = True
            await h.engine.stop(0)
            out = (await collect(stream))[0]
            assert out.finish_reason is FinishReason.ABORT and isinstance(out.error, NotReadyError)
            with pytest.raises(NotReadyError, match="shutting down"):
                h.engine.submit([ask("b", [3])])

    run(main())
