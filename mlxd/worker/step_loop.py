"""The worker's loop: plans in, results out, one step in flight (mlxd/step.py says in which order).

It does not know MLX: a step runner is anything that can launch a plan.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from mlxd.step import DiskRequest, Flush, Message, Shutdown, StepPlan, StepResult, ToWorker
from mlxd.worker.channel import Channel, ProtocolError
from mlxd.worker.heartbeat import Activity


class PendingStep(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Waits for the tokens. Times and memory are filled in by the loop."""


class StepRunner(Protocol):
    """What runs plans: the model's Runner, or playback."""

    def launch(self, plan: StepPlan, /) -> PendingStep:
        """Starts the step and returns without waiting for it."""


class StoredBlocks(Protocol):
    """What handles messages about stored blocks: the disk tier."""

    def start(self) -> None:
        """Begins, now that the front knows of it."""

    def stop(self) -> None:
        """Ends, without leaving much unwritten."""

    def handle(self, message: DiskRequest, /) -> None:
        """Does what concerns the pool, in order with the plans launched so far; waits for nothing."""

    def collect(self) -> None:
        """Takes what was copied out of the pool; waits for it. Called after each step, or if none runs."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that the device's allocator holds."""

    active: int = 0
    peak: int = 0
    cache: int = 0


@dataclass(frozen=True, slots=True)
class InFlight:
    step_id: int
    step: PendingStep
    launched: float


class StepLoop:
    """Runs until Shutdown or the end of the channel. A step that raises ends it with that exception."""

    def __init__(
        self,
        channel: Channel[ToWorker],
        runner: StepRunner,
        activity: Activity,
        *,
        memory: Callable[[], MemoryUse] = MemoryUse,
        disk: Callable[[], StoredBlocks | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._runner = runner
        self._activity = activity
        self._memory = memory
        self._find_disk = disk
        self._disk: StoredBlocks | None = None
        self._clock = clock
        self._in_flight: InFlight | None = None
        self._last_end = 0.0

    def run(self) -> None:
        """Returns after Shutdown; EOFError when the front is gone."""
        self._disk = disk = self._find_disk()
        if disk is None:
            self._serve()
            return
        disk.start()
        try:
            self._serve()
        finally:
            disk.stop()

    def _serve(self) -> None:
        while True:
            message = self._channel.receive()
            if isinstance(message, StepPlan):
                self._launch(message)
            elif isinstance(message, Flush):
                self._finish(None)
            elif isinstance(message, Shutdown):
                self._finish(None)
                return
            elif isinstance(message, DiskRequest) and self._disk is not None:
                self._disk.handle(message)
                if self._in_flight is None:
                    self._disk.collect()
            else:
                raise ProtocolError(f"unexpected {type(message).__name__}")

    def _launch(self, plan: StepPlan) -> None:
        launched = self._clock()
        if self._in_flight is None:
            self._activity.begin(plan.step_id, launched)
        try:
            step = self._runner.launch(plan)
        except Exception:
            # The step before has its tokens all the same: they spare its clients a recomputation.
            with contextlib.suppress(Exception):
                self._finish(None)
            raise
        self._finish(InFlight(plan.step_id, step, launched))

    def _finish(self, following: InFlight | None) -> None:
        """Sends the result of the step in flight, if there is one; `following` takes its place."""
        current, self._in_flight = self._in_flight, following
        if current is None:
            return
        result = current.step.result()
        end = self._clock()
        memory = self._memory()
        message: Message = msgspec.structs.replace(
            result,
            step_seconds=end - max(current.launched, self._last_end),
            active_memory_bytes=memory.active,
            peak_memory_bytes=memory.peak,
            cache_memory_bytes=memory.cache,
        )
        self._last_end = end
        if following is None:
            self._activity.end()
        else:
            self._activity.begin(following.step_id, end)
        self._channel.send(message)
        if self._disk is not None:
            self._disk.collect()
