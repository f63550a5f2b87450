"""The pump of one worker: plans its steps and sends them, each before the last one's result is read.

It does not know clients, or that workers come and go: each has a pump and a scheduler of its own. Everything
runs in callbacks of the event loop: what happens to requests ends in `pump`, which sends what can be sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from mlxd.engine.disk_tier import FETCH_TIMEOUT_SECONDS, DiskTier
from mlxd.engine.request import Request
from mlxd.engine.results import StepResults, is_answer
from mlxd.engine.scheduler import Scheduler
from mlxd.engine.stats import EngineStats
from mlxd.engine.step_builder import ScheduledStep
from mlxd.step import DiskReport, Flush, StepResult, ToWorker

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2
"""The one the worker computes and the one it has ready; more would only waste rows of ended requests."""
EARLY_PLAN_ROWS = 16
"""Results of so many rows are looked at after the next plan is sent: on a GPU the worker would wait for it. A
request that ends here then has one more row that nobody wants, which among so many costs less."""
IDLE_CHECK_SECONDS = 1.0
"""How long the worker has been idle when its pump looks for leaks: that takes some milliseconds, for which
neither the last answer's end nor a request that follows at once need wait."""


class StepPump:
    """Sends `scheduler`'s plans and takes their results, until it is closed.

    `on_admitted` is told of each request once the worker has the plan that admits it; `make_room` frees
    blocks for those that no running request will ever make room for, and says whether there were any.
    `is_listening`: whether the worker still takes plans. None is made that it never sees, or whoever is in it
    would seem to have had a part in its end.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        results: StepResults,
        stats: EngineStats,
        *,
        clock: Callable[[], float],
        send: Callable[[ToWorker], None],
        is_listening: Callable[[], bool],
        on_admitted: Callable[[Request], None],
        make_room: Callable[[], bool],
    ) -> None:
        self.scheduler = scheduler
        self._results = results
        self._stats = stats
        self._clock = clock
        self._send = send
        self._is_listening = is_listening
        self._on_admitted = on_admitted
        self._make_room = make_room
        self._loop = asyncio.get_running_loop()
        self._in_flight: deque[ScheduledStep] = deque()
        self._worker_waits = False
        """the worker reads one more message before it gives the last plan's result"""
        self._pump_handle: asyncio.Handle | None = None
        self._disk_timer: asyncio.TimerHandle | None = None
        self._idle_check: asyncio.TimerHandle | None = None

    @property
    def in_flight(self) -> Sequence[ScheduledStep]:
        """Steps sent whose results have not come, oldest first: the one that the worker computes."""
        return self._in_flight

    def close(self) -> None:
        """Send nothing any more: the worker is gone, or not needed."""
        for handle in (self._pump_handle, self._disk_timer, self._idle_check):
            if handle is not None:
                handle.cancel()

    def pump_soon(self) -> None:
        """Pump once this turn of the loop is over, so that what arrives together is planned together."""
        if self._pump_handle is None:
            self._pump_handle = self._loop.call_soon(self.pump)

    def pump(self) -> None:
        """Send what can be sent now."""
        if self._pump_handle is not None:
            self._pump_handle.cancel()
            self._pump_handle = None
        scheduler = self.scheduler
        while len(self._in_flight) < MAX_STEPS_IN_FLIGHT and self._is_listening():
            step = scheduler.schedule(self._clock())
            self._send_to_disk()
            if step is None:
                # What waits with nobody running waits for blocks, which only pins can hold then.
                if not self._in_flight and scheduler.starves and self._make_room():
                    continue
                break
            self._in_flight.append(step)
            self._send(step.plan)
            self._worker_waits = True
            for request in step.admitted:
                request.stream.begin()
                self._on_admitted(request)
        if self._worker_waits and len(self._in_flight) < MAX_STEPS_IN_FLIGHT:
            self._send(Flush())
            self._worker_waits = False
        if scheduler.disk is not None:
            self._tend_disk(scheduler.disk)
        if self._idle_check is None and not self._in_flight and scheduler.num_unfinished == 0:
            self._idle_check = self._loop.call_later(IDLE_CHECK_SECONDS, self.check_integrity)

    def on_result(self, result: StepResult) -> bool:
        """Give the oldest step in flight its result. False if this is none of it."""
        if not self._in_flight or not is_answer(result, self._in_flight[0]):
            return False
        step = self._in_flight.popleft()
        if step.num_rows >= EARLY_PLAN_ROWS:
            self.pump()
        self.scheduler.update(step, result.step_seconds)
        self._results.apply(step, result, self.scheduler)
        self.pump()
        return True

    def on_disk_report(self, report: DiskReport) -> None:
        scheduler = self.scheduler
        if scheduler.disk is not None:
            now = self._clock()
            scheduler.disk.on_report(report, now)
            scheduler.expire_restores(now)
            self.pump()

    def check_integrity(self) -> None:
        """Look for leaks, if the worker has become idle since the last look and still is."""
        if self._idle_check is None:
            return
        self._idle_check.cancel()
        self._idle_check = None
        if self._in_flight or self.scheduler.num_unfinished:
            return
        try:
            self.scheduler.check_integrity()
        except AssertionError:
            self._stats.num_integrity_errors += 1
            logger.exception("slots or blocks leaked")

    def _send_to_disk(self) -> None:
        """What must reach the worker before the next plan."""
        if self.scheduler.disk is not None:
            for message in self.scheduler.disk.take_messages():
                self._send(message)

    def _tend_disk(self, disk: DiskTier) -> None:
        """All plans are sent: store what they fill, and let nobody wait for a dead disk for ever."""
        disk.store(self.scheduler.kv.index, busy=bool(self._in_flight), now=self._clock())
        self._send_to_disk()
        if disk.num_restoring and self._disk_timer is None:
            self._disk_timer = self._loop.call_later(FETCH_TIMEOUT_SECONDS, self._on_disk_timer)

    def _on_disk_timer(self) -> None:
        self._disk_timer = None
        self.scheduler.expire_restores(self._clock())
        self.pump()
