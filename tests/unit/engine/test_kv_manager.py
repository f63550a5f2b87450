"""The KV manager and the scheduler without an engine: what is published when, and what a refusal leaves."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlxd.config import SchedulerConfig
from mlxd.engine import kv_manager
from mlxd.engine.kv_manager import KvManager
from mlxd.engine.prefix_report import Cause, HitType
from mlxd.engine.request import GenerationRequest, Request, RequestStatus
from mlxd.engine.scheduler import Scheduler
from mlxd.engine.step_builder import ScheduledStep


def make_kv(num_blocks: int = 20, **options: Any) -> KvManager:
    return KvManager(num_blocks=num_blocks, block_size=4, max_num_seqs=4, max_model_len=200, **options)


def make_request(name: str, prompt: list[int], max_tokens: int = 50, **fields: Any) -> Request:
    params = GenerationRequest(request_id=name, prompt_token_ids=prompt, max_tokens=max_tokens, **fields)
    return Request(
        params,
        stream=cast(Any, None),
        detokenizer=cast(Any, None),
        stop_token_ids=frozenset(),
        max_tokens=max_tokens,
        arrival_time=0.0,
    )


def admit(kv: KvManager, request: Request, headroom: int = 0) -> bool:
    return kv.admit(request, kv.match(request), headroom)


def compute(kv: KvManager, request: Request) -> None:
    """All of its tokens, at once, and it is over."""
    assert admit(kv, request)
    request.num_computed_tokens = request.num_tokens
    kv.release(request)


@dataclass
class Steps:
    """A scheduler whose samples are chosen by the test."""

    scheduler: Scheduler

    def plan(self) -> ScheduledStep:
        step = self.scheduler.schedule(0.0)
        assert step is not None
        return step

    def sample(self, step: ScheduledStep, token_id: int) -> None:
        self.scheduler.update(step, 0.001)
        for request in step.sampled:
            request.output_token_ids.append(token_id)


@pytest.fixture
def steps() -> Steps:
    return Steps(Scheduler(SchedulerConfig(max_num_seqs=4), make_kv()))


def test_blocks_are_shared_from_the_plan_after_the_one_that_fills_them(steps: Steps) -> None:
    """A plan copies blocks before it writes any, so what it writes itself is not to be copied."""
    scheduler = steps.scheduler
    first = make_request("first", [5, 6, 7])
    scheduler.add(first)
    steps.sample(steps.plan(), 8)
    second = make_request("second", [5, 6, 7, 8, 9])
    scheduler.add(second)
    # This plan's decode row fills the block 5 6 7 8, whose tokens are known.
    step = steps.plan()
    assert step.num_decode_rows == 1 and step.admitted == [second]
    assert second.num_cached_tokens == 0
    steps.sample(step, 9)
    third = make_request("third", [5, 6, 7, 8, 9])
    scheduler.add(third)
    assert steps.plan().admitted == [third]
    assert third.num_cached_tokens == 4


def test_a_running_requests_answer_is_published_block_by_block(steps: Steps) -> None:
    scheduler = steps.scheduler
    first = make_request("first", [5, 6])
    scheduler.add(first)
    in_flight = steps.plan()
    for token_id in range(10, 30):
        following = steps.plan()
        steps.sample(in_flight, token_id)
        in_flight = following
    other = make_request("other", [*first.params.prompt_token_ids, *first.output_token_ids, 9])
    scheduler.add(other)
    steps.plan()
    # 22 tokens are known; at most two blocks' worth of them is not published yet.
    assert 22 - 2 * 4 <= other.num_cached_tokens <= 21


def test_samples_that_were_overtaken_are_not_published() -> None:
    """Two samples in flight: the second one's row computes the first, which nobody may know any more."""
    kv = make_kv()
    request = make_request("a", [5, 6, 7])
    assert admit(kv, request)
    request.output_token_ids = [8]
    assert kv.tables.reserve(request.slot, 6)
    request.num_computed_tokens, request.num_pending_tokens = 5, 2
    # Tokens were put in their place (Scheduler.restart).
    request.output_token_ids += [20, 21, 22]
    kv.release(request)
    asked = make_request("b", [5, 6, 7, 8, 20, 21, 22, 9])
    assert admit(kv, asked)
    assert asked.num_cached_tokens == 4


def test_a_refused_newcomer_leaves_everything_cached() -> None:
    kv = make_kv(num_blocks=11)
    compute(kv, make_request("done", list(range(10, 20))))
    running = make_request("running", [1] * 20)
    assert admit(kv, running)
    newcomer = make_request("newcomer", list(range(10, 40)))
    for _ in range(2):
        # It would begin with two blocks and take over a third that is partly filled.
        match = kv.match(newcomer)
        assert (len(match.block_ids), match.num_common, match.other_token_ids) == (2, 2, ())
        assert not kv.admit(newcomer, match, headroom=0)
        assert newcomer.slot == -1 and newcomer.prefix_hit is None
        kv.check_integrity()
    kv.release(running, keep=False)
    assert admit(kv, newcomer)
    assert newcomer.num_cached_tokens == 10
    assert kv.take_copies() == ()
    assert newcomer.prefix_hit is not None and newcomer.prefix_hit.type is HitType.PREFIX


def test_a_block_in_which_prompts_part_is_copied() -> None:
    kv = make_kv()
    compute(kv, make_request("done", [1, 2, 3, 4, 5, 6, 7, 8]))
    [source] = kv.match(make_request("look", [1, 2, 3, 4, 9])).block_ids
    request = make_request("other", [1, 2, 3, 4, 5, 6, 20, 21])
    match = kv.match(request)
    assert (match.block_ids, match.num_common, match.other_token_ids) == ([source], 2, (7, 8))
    assert kv.admit(request, match, headroom=0)
    assert kv.take_copies() == ((match.nearest, kv.tables.block_ids(request.slot)[1]),)
    assert kv.take_copies() == ()
    assert request.num_computed_tokens == request.num_cached_tokens == 6


def test_what_is_copied_counts_as_used() -> None:
    kv = make_kv()
    old, young = make_request("old", [1, 2, 3, 4]), make_request("young", [11, 12, 13, 14])
    compute(kv, old)
    compute(kv, young)
    copying = make_request("copying", [1, 2, 3, 5])
    assert admit(kv, copying)
    assert len(kv.take_copies()) == 1
    assert kv.index.evict(1) == 1
    assert kv.match(make_request("look", [1, 2, 3, 4, 5])).block_ids != []
    assert kv.match(make_request("look", [11, 12, 13, 14, 15])).block_ids == []


def test_copies_may_not_be_left_out_of_a_plan() -> None:
    kv = make_kv()
    compute(kv, make_request("done", [1, 2, 3, 4]))
    assert admit(kv, make_request("other", [1, 2, 9]))
    with pytest.raises(AssertionError, match="left out"):
        kv.check_integrity()


def test_headroom_counts_what_can_be_evicted() -> None:
    kv = make_kv(num_blocks=11)
    compute(kv, make_request("done", list(range(10, 50))))
    assert (kv.pool.num_free, kv.num_available_blocks, kv.num_used_blocks) == (0, 10, 0)
    assert not admit(kv, make_request("a", [1] * 20), headroom=6)
    assert admit(kv, make_request("a", [1] * 20), headroom=5)
    assert kv.num_evicted_blocks == 5


def test_decode_rows_evict_only_what_they_need() -> None:
    kv = make_kv(num_blocks=14)
    compute(kv, make_request("done", list(range(10, 50))))
    requests = [make_request(str(i), [1 + i] * 4) for i in range(3)]
    steps = Steps(Scheduler(SchedulerConfig(max_num_seqs=4), kv))
    for request in requests:
        steps.scheduler.add(request)
    steps.sample(steps.plan(), 7)
    assert (kv.pool.num_free, kv.num_cached_blocks) == (0, 13)
    steps.plan()
    assert kv.num_evicted_blocks == 3


def test_an_evicted_block_is_given_as_the_cause() -> None:
    kv = make_kv(num_blocks=6)
    prompt = list(range(10, 30))
    compute(kv, make_request("done", prompt))
    compute(kv, make_request("other", [1] * 8))
    request = make_request("again", prompt)
    assert admit(kv, request)
    hit = request.prefix_hit
    assert hit is not None
    assert (hit.type, hit.num_tokens, hit.cause) == (HitType.PREFIX, 12, Cause.EVICTED)


def test_clear_forgets_what_nobody_holds() -> None:
    kv = make_kv()
    compute(kv, make_request("done", list(range(10, 30))))
    running = make_request("running", list(range(10, 20)))
    assert admit(kv, running)
    assert kv.take_copies()
    assert kv.clear(kv.num_total_blocks) == 3
    assert kv.num_cached_blocks == 2
    kv.release(running)
    again = make_request("again", list(range(10, 30)))
    assert admit(kv, again)
    assert again.num_cached_tokens == 9


def test_a_failed_requests_descendants_go_with_it() -> None:
    kv = make_kv()
    failing = make_request("failing", list(range(10, 18)))
    assert admit(kv, failing)
    failing.num_computed_tokens = 8
    kv.publish(failing)
    heir = make_request("heir", list(range(10, 24)))
    assert admit(kv, heir)
    assert heir.num_cached_tokens == 8
    heir.num_computed_tokens = 14
    kv.publish(heir)
    assert kv.num_cached_blocks == 3
    kv.release(failing, keep=False)
    assert kv.num_cached_blocks == 0
    kv.release(heir)
    assert (kv.num_cached_blocks, kv.pool.num_used) == (0, 0)
    kv.check_integrity()


def test_finishing_with_an_error_forgets_and_otherwise_keeps() -> None:
    for status in [status for status in RequestStatus if status.is_finished]:
        scheduler = Scheduler(SchedulerConfig(max_num_seqs=4), make_kv())
        request = make_request("a", [5, 6, 7, 8, 9])
        scheduler.add(request)
        steps = Steps(scheduler)
        steps.sample(steps.plan(), 8)
        scheduler.finish(request, status)
        assert (scheduler.kv.num_cached_blocks == 0) == (status is RequestStatus.FINISHED_ERROR)
        scheduler.check_integrity()


def test_a_large_pools_leaks_show_in_the_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at each of its blocks would hold up whoever comes meanwhile."""
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=4), make_kv())
    scheduler.kv.index = cast(Any, SimpleNamespace(num_evictable=0, check_integrity=lambda held: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        scheduler.check_integrity()
    monkeypatch.setattr(kv_manager, "MAX_CHECKED_BLOCKS", 19)
    scheduler.check_integrity()
    scheduler.kv.pool.allocate(1)
    with pytest.raises(AssertionError, match="1 blocks are owned and 0 pinned, but nothing runs"):
        scheduler.check_integrity()


def test_no_block_is_read_by_one_copy_and_written_by_another() -> None:
    """The kernel copies a plan's blocks side by side."""
    kv = make_kv(12)
    compute(kv, make_request("p", [2, 3, 4, 5, 6, 7, 8, 9, 10]))
    compute(kv, make_request("q", [12, 13, 14, 15, 16, 17, 18, 19, 20]))
    assert admit(kv, make_request("a", [2, 3, 4, 5, 6, 7, 40, 41, 42]))
    # It needs all blocks but one, so that which the other request copies would be given to it.
    long = make_request("b", [12, 13, 14, 15, 16, 17, *range(30, 50)])
    assert not admit(kv, long, headroom=1)
    assert len(kv.take_copies()) == 1
    assert admit(kv, long, headroom=1)
    assert len(kv.take_copies()) == 1
