"""The few sizes that steps come in: rows, tokens and chunks are filled up to the next one.

It does not know what fills them, nor MLX. Steps of one shape run the same graph, and a new shape takes longer
than a step.
"""

from __future__ import annotations

from collections.abc import Sequence

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
ROW_STEP = 64
"""More rows come in multiples of this."""
TOKEN_STEP = 64
SIZES = 4
"""a power of two"""


def common_size(size: int, step: int) -> int:
    """The next multiple of `step` that is one of few: SIZES from a size to its double."""
    steps = -(-size // step)
    grain = max(1, (1 << (steps - 1).bit_length()) // (2 * SIZES))
    return -(-steps // grain) * grain * step


def power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << (count - 1).bit_length()


def at_least(count: int, buckets: Sequence[int], step: int) -> int:
    """The smallest bucket, or multiple of `step` beyond them, that holds `count`."""
    return next((bucket for bucket in buckets if bucket >= count), -(-count // step) * step)
