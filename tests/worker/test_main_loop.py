"""The order of launches and results, times, failures; and the heartbeat beside them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from mlxd.step import Flush, FromWorker, Heartbeat, Message, Shutdown, StepPlan, StepResult, ToWorker
from mlxd.worker.channel import Channel, ProtocolError
from mlxd.worker.heartbeat import Activity, Pulse
from mlxd.worker.step_loop import MemoryUse, StepLoop
from tests.worker.worker_plans import Row, int32, step_plan


@dataclass
class FakeClock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeStep:
    runner: FakeRunner
    step_id: int

    def result(self) -> StepResult:
        self.runner.log.append(f"result {self.step_id}")
        self.runner.busy_during_result.append(self.runner.activity.beat(0).step_id)
        if self.step_id == self.runner.fails_in_result:
            raise RuntimeError("device lost")
        self.runner.clock.now += 2.0
        return StepResult(self.step_id, int32([self.step_id]))


@dataclass
class FakeRunner:
    """Launching takes 0.25 s of the fake clock, waiting for a result 2 s."""

    clock: FakeClock
    activity: Activity
    fails_in_launch: int = -1
    fails_in_result: int = -1
    log: list[str] = field(default_factory=list)
    busy_during_result: list[int] = field(default_factory=list)

    def launch(self, plan: StepPlan) -> FakeStep:
        self.log.append(f"launch {plan.step_id}")
        if plan.step_id == self.fails_in_launch:
            raise RuntimeError("no kernel")
        self.clock.now += 0.25
        return FakeStep(self, plan.step_id)


@dataclass
class Harness:
    """A loop over a socketpair whose other end, the front's, sends first and reads afterwards."""

    front: Channel[FromWorker]
    loop: StepLoop
    runner: FakeRunner
    activity: Activity

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.front.send(message)

    def results(self, count: int) -> list[StepResult]:
        messages = [self.front.receive() for _ in range(count)]
        assert all(isinstance(message, StepResult) for message in messages)
        return messages  # type: ignore[return-value]


@pytest.fixture
def harness() -> Iterator[Harness]:
    ours, theirs = socket.socketpair()
    front: Channel[FromWorker] = Channel(ours, FromWorker)  # type: ignore[arg-type]
    worker: Channel[ToWorker] = Channel(theirs, ToWorker)  # type: ignore[arg-type]
    clock = FakeClock()
    activity = Activity(clock)
    runner = FakeRunner(clock, activity)
    loop = StepLoop(worker, runner, activity, memory=lambda: MemoryUse(10, 30, 5), clock=clock)
    yield Harness(front, loop, runner, activity)
    front.close()
    worker.close()


def plan(step_id: int) -> StepPlan:
    return step_plan(step_id, [Row(0, [1], 1, [9])], 4)


def test_the_next_plan_is_launched_before_the_result_is_read(harness: Harness) -> None:
    harness.send(plan(1), plan(2), plan(3), Flush(), plan(4), Shutdown())
    harness.loop.run()
    assert harness.runner.log == [
        *("launch 1", "launch 2", "result 1", "launch 3", "result 2", "result 3"),
        *("launch 4", "result 4"),
    ]
    assert [result.step_id for result in harness.results(4)] == [1, 2, 3, 4]


def test_times_and_memory_are_filled_in(harness: Harness) -> None:
    harness.send(plan(1), plan(2), Flush(), Shutdown())
    harness.loop.run()
    first, second = harness.results(2)
    # Step 1: two launches and its own wait. Step 2 runs from the end of step 1.
    assert (first.step_seconds, second.step_seconds) == (2.5, 2.0)
    assert (first.active_memory_bytes, first.peak_memory_bytes, first.cache_memory_bytes) == (10, 30, 5)


def test_the_busy_step_is_the_one_that_is_waited_for(harness: Harness) -> None:
    harness.send(plan(1), plan(2), Flush(), Shutdown())
    harness.loop.run()
    assert harness.runner.busy_during_result == [1, 2]
    harness.runner.clock.now += 50
    assert harness.activity.beat(7) == Heartbeat(2, 0.0, 7)


def test_a_flush_with_nothing_in_flight_is_harmless(harness: Harness) -> None:
    harness.send(Flush(), Flush(), Shutdown())
    harness.loop.run()
    assert harness.runner.log == []


def test_a_launch_that_raises_still_sends_the_result_before(harness: Harness) -> None:
    harness.runner.fails_in_launch = 2
    harness.send(plan(1), plan(2))
    with pytest.raises(RuntimeError, match="no kernel"):
        harness.loop.run()
    assert [result.step_id for result in harness.results(1)] == [1]


def test_a_result_that_raises_ends_the_loop(harness: Harness) -> None:
    harness.runner.fails_in_result = 1
    harness.send(plan(1), plan(2))
    with pytest.raises(RuntimeError, match="device lost"):
        harness.loop.run()


def test_the_end_of_the_channel_ends_the_loop(harness: Harness) -> None:
    harness.send(plan(1))
    harness.front.close()
    with pytest.raises(EOFError):
        harness.loop.run()


def test_a_message_out_of_place_is_refused(harness: Harness) -> None:
    from mlxd.step import WorkerInit

    harness.send(WorkerInit({}))
    with pytest.raises(ProtocolError, match="WorkerInit"):
        harness.loop.run()


def test_the_heartbeat_tells_how_long_a_step_takes() -> None:
    clock = FakeClock()
    activity = Activity(clock)
    sent: list[Message] = []
    beaten = threading.Event()

    def send(message: Message) -> None:
        sent.append(message)
        beaten.set()

    activity.begin(5, clock())
    clock.now += 3.5
    pulse = Pulse(send, activity, lambda: 42, on_orphaned=lambda: None, interval_seconds=0.001)
    pulse.start()
    assert beaten.wait(10)
    pulse.stop()
    assert sent[0] == Heartbeat(5, 3.5, 42)
    count = len(sent)
    assert not threading.Event().wait(0.01)
    assert len(sent) == count


def test_the_heartbeat_notices_that_the_front_is_gone() -> None:
    orphaned = threading.Event()

    def send(message: Message) -> None:
        raise BrokenPipeError(os.strerror(32))

    pulse = Pulse(send, Activity(), lambda: 0, on_orphaned=orphaned.set, interval_seconds=0.001)
    pulse.start()
    assert orphaned.wait(10)
    pulse.stop()
