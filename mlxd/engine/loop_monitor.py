"""How late the event loop runs its timers: the stall every client of the front would feel.

It does not know what the loop is doing.
"""

from __future__ import annotations

import asyncio
from collections import deque

from mlxd.metrics import LAG_SECONDS, Histogram

INTERVAL_SECONDS = 0.05
NUM_SAMPLES = 1200
"""One minute."""


class LoopMonitor:
    """Sets a timer again and again and keeps by how many seconds each came late."""

    def __init__(self) -> None:
        self.samples: deque[float] = deque(maxlen=NUM_SAMPLES)
        self.histogram = Histogram(LAG_SECONDS)
        """of all samples since start"""
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._arm(loop)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def percentile(self, fraction: float) -> float:
        """Lag in seconds that `fraction` of the last minute's samples do not exceed; 0 without samples."""
        if not self.samples:
            return 0.0
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = loop.call_later(INTERVAL_SECONDS, self._tick, loop, loop.time() + INTERVAL_SECONDS)

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        lag = max(0.0, loop.time() - due)
        self.samples.append(lag)
        self.histogram.observe(lag)
        self._arm(loop)
