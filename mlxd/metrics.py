"""Histograms that cost a bisection and two additions, for the event loop's thread alone.

It does not know what is measured, nor Prometheus: api/metrics.py puts them on a page.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

WAIT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0),
)
"""From a prefix hit on an idle GPU to a long prompt at the end of a long queue."""
TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)
"""Between two tokens: 1 ms is a small model alone, 200 ms the scheduler's default target for a full step."""
REQUEST_SECONDS = (
    *(0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0),
)
LAG_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""5 ms is what the front means never to exceed (bench/stalls.py)."""
TOKENS = tuple(2.0**n for n in range(18))
"""To 131,072."""
BATCH_ROWS = tuple(2.0**n for n in range(11))


class Histogram:
    """Counts by upper bound. `counts[i]` is of values <= bounds[i] and above the bound before; the last
    count is of those above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, or so many equal values at once."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[int]:
        """How many values do not exceed each bound, then how many there are."""
        return list(accumulate(self.counts))
