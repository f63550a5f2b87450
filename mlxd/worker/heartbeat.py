"""A beat a second to the front, from a thread of its own, so that a long step is not taken for a dead worker.

It does not know what a step does. It is also what notices during a long load or step that the front is gone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from mlxd.step import Heartbeat, Message

INTERVAL_SECONDS = 1.0


class Activity:
    """The step that is running now, set by the step loop and read by the heartbeat.

    The pair is replaced whole, so that the reader needs no lock.
    """

    __slots__ = ("_clock", "_running", "last_step_id")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: tuple[int, float] | None = None
        self.last_step_id = 0

    def begin(self, step_id: int, started: float) -> None:
        self.last_step_id = step_id
        self._running = (step_id, started)

    def end(self) -> None:
        self._running = None

    def beat(self, active_memory_bytes: int) -> Heartbeat:
        """`busy_seconds` is 0 between steps."""
        running = self._running
        if running is None:
            return Heartbeat(self.last_step_id, 0.0, active_memory_bytes)
        step_id, started = running
        return Heartbeat(step_id, max(0.0, self._clock() - started), active_memory_bytes)


class Pulse:
    """The thread. `send` and `active_memory` must be safe to call from it."""

    def __init__(
        self,
        send: Callable[[Message], None],
        activity: Activity,
        active_memory: Callable[[], int],
        *,
        on_orphaned: Callable[[], None],
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self._send = send
        self._activity = activity
        self._active_memory = active_memory
        self._on_orphaned = on_orphaned
        self._interval_seconds = interval_seconds
        self._stopped = threading.Event()
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No beat after this returns (except while the front takes no bytes)."""
        self._stopped.set()
        self._thread.join(timeout=self._interval_seconds)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            try:
                self._send(self._activity.beat(self._active_memory()))
            except OSError:
                self._on_orphaned()
                return
            if os.getppid() != self._parent:
                self._on_orphaned()
                return


def exit_now() -> NoReturn:
    """Ends the process from any thread, whatever the others are doing; nobody is left to report to."""
    os._exit(1)
