"""The uniform numbers that sampling turns into tokens: a hash of (seed, position), so a replay repeats them.

It does not know rows, batches or MLX: neighbours and order cannot matter.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Iterable[int], positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """One number strictly between 0 and 1 for each (seed, position): an odd multiple of 2**-24.

    splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) of the
    position, started at the mixed seed so that neighbouring seeds have unrelated streams.
    """
    state = _mix(np.array([seed & _MASK for seed in seeds], dtype=np.uint64) + _GAMMA)
    hashed = _mix(state + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    odd = (hashed >> np.uint64(41)) * np.uint64(2) + np.uint64(1)
    return odd.astype(np.float32) * np.float32(2.0**-24)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
