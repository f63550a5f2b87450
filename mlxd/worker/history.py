"""Which tokens a request has seen and produced, for the penalties; on the device, one lane a request.

It does not know slots or sampling parameters. Lane 0 belongs to nobody and stays empty: rows without a
history share it.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

EMPTY_LANE = 0


class TokenHistory:
    """Tables [num_lanes, vocab_size] that grow with the number of requests that need them."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._free: list[int] = []
        self._prompt_seen = mx.zeros((1, vocab_size), dtype=mx.bool_)
        self._output_counts = mx.zeros((1, vocab_size), dtype=mx.int32)

    def add(self, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]) -> int:
        """Take a lane for a request with these tokens so far."""
        if not self._free:
            self._grow()
        lane = self._free.pop()
        counts = [np.bincount(ids, minlength=self._vocab_size) for ids in (prompt, output)]
        self._prompt_seen[lane] = mx.array(counts[0] > 0)
        self._output_counts[lane] = mx.array(counts[1].astype(np.int32))
        return lane

    def remove(self, lane: int) -> None:
        self._free.append(lane)

    def read(self, lanes: list[int]) -> tuple[mx.array, mx.array]:
        """Prompt seen (bool) and output counts (int32), [n, vocab_size]."""
        index = mx.array(lanes, dtype=mx.int32)
        return self._prompt_seen[index], self._output_counts[index]

    def append(self, lanes: list[int], tokens: mx.array) -> None:
        """Count tokens, int32 [n], one a lane; no lane twice."""
        index = mx.array(lanes, dtype=mx.int32)
        self._output_counts = self._output_counts.at[index, tokens].add(1)

    def _grow(self) -> None:
        num_lanes = self._output_counts.shape[0]
        self._free = list(range(2 * num_lanes - 1, num_lanes - 1, -1))
        extra = [(0, num_lanes), (0, 0)]
        self._prompt_seen = mx.pad(self._prompt_seen, extra)
        self._output_counts = mx.pad(self._output_counts, extra)
