"""What the tokens so far take from each logit, for the three penalties; on the device, one lane a request.

It does not know slots. Lane 0 belongs to nobody and changes no logit: rows without penalties share it.

The tables hold effects, not tokens, so that a step applies them with a few additions and multiplications
(mx.where over a vocabulary is ten times as slow on CPUs).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxd.step import SamplingParams

NEUTRAL_LANE = 0


class TokenHistory:
    """Tables [num_lanes, vocab_size] that grow with the number of requests that need them."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._free: list[int] = []
        self._counts = mx.zeros((1, vocab_size), dtype=mx.int32)
        self._factors = mx.ones((1, vocab_size))
        self._offsets = mx.zeros((1, vocab_size))
        # Per lane, [num_lanes]: repetition, presence, frequency.
        self._penalties = np.array([[1, 0, 0]], dtype=np.float32)

    def add(
        self, params: SamplingParams, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]
    ) -> int:
        """Take a lane for a request with these tokens so far."""
        if not self._free:
            self._grow()
        lane = self._free.pop()
        counts = np.bincount(output, minlength=self._vocab_size).astype(np.int32)
        repetition, presence, frequency = self._penalties[lane] = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        factors = np.ones(self._vocab_size, dtype=np.float32)
        factors[prompt] = factors[output] = repetition
        # In float32 like `append`, so that a request that is admitted again goes on to the bit.
        offsets = np.float32(frequency) * counts.astype(np.float32) + np.float32(presence) * (counts > 0)
        self._counts[lane] = mx.array(counts)
        self._factors[lane] = mx.array(factors)
        self._offsets[lane] = mx.array(offsets.astype(np.float32))
        return lane

    def remove(self, lane: int) -> None:
        self._free.append(lane)

    def penalise(self, logits: mx.array, lanes: list[int]) -> mx.array:
        """vLLM's penalties on logits [n, vocab_size], one lane a row. Lane 0 leaves its row as it is.

        Repetition divides positive logits and multiplies negative ones, over prompt and output tokens;
        frequency (times the count) and presence are subtracted, over output tokens.
        """
        index = mx.array(lanes, dtype=mx.int32)
        factors = self._factors[index]
        scaled = mx.maximum(logits, 0) / factors + mx.minimum(logits, 0) * factors
        return scaled - self._offsets[index]

    def append(self, lanes: list[int], tokens: mx.array) -> None:
        """Count tokens, int32 [n], one a lane; no lane twice."""
        repetition, presence, frequency = mx.array(self._penalties[lanes].T)
        place = (mx.array(lanes, dtype=mx.int32), tokens)
        counts = self._counts[place] + 1
        self._counts[place] = counts
        self._factors[place] = repetition
        self._offsets[place] = frequency * counts.astype(mx.float32) + presence

    def _grow(self) -> None:
        num_lanes = len(self._penalties)
        self._free = list(range(2 * num_lanes - 1, num_lanes - 1, -1))
        extra = [(0, num_lanes), (0, 0)]
        self._counts = mx.pad(self._counts, extra)
        self._factors = mx.pad(self._factors, extra)
        self._offsets = mx.pad(self._offsets, extra)
        self._penalties = np.pad(self._penalties, extra)
