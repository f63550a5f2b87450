"""Log-probabilities of the model's raw distribution, at the sampled token and the best alternatives.

It does not know how the token was chosen.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxd.step import TokenLogprobs
from mlxd.worker.exponential import exp_nonpositive

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's API uses the same number."""

NUM_CANDIDATES = 32
"""Best tokens fetched a row, enough for the API's 20 alternatives."""


class RawLogprobs:
    """logits float32 [n, vocab_size], tokens int32 [n]; for each row (its index, alternatives)."""

    def __init__(self, logits: mx.array, tokens: mx.array, requests: list[tuple[int, int]]) -> None:
        self._requests = requests
        largest = mx.max(logits, axis=-1, keepdims=True)
        normaliser = largest + mx.log(exp_nonpositive(logits - largest).sum(axis=-1, keepdims=True))
        chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)
        self._logprob = (chosen - normaliser).squeeze(-1)
        self._rank = (logits > chosen).sum(axis=-1) + 1
        self.arrays = [self._logprob, self._rank]
        most = max(count for _, count in requests)
        self._top: tuple[mx.array, mx.array] | None = None
        if most > 0:
            size = min(max(most, NUM_CANDIDATES), logits.shape[-1])
            ids = mx.argpartition(logits, -size, axis=-1)[:, -size:]
            self._top = (ids, mx.take_along_axis(logits, ids, axis=-1) - normaliser)
            self.arrays += self._top

    def result(self, num_rows: int) -> tuple[TokenLogprobs | None, ...]:
        """One entry for each of `num_rows` sampled rows. Waits for the arrays."""
        logprobs = np.maximum(np.array(self._logprob), MIN_LOGPROB)
        ranks = np.array(self._rank)
        entries: list[TokenLogprobs | None] = [None] * num_rows
        for row, (index, count) in enumerate(self._requests):
            top_ids, top_values = self._best(row, count)
            entries[index] = TokenLogprobs(float(logprobs[row]), int(ranks[row]), top_ids, top_values)
        return tuple(entries)

    def _best(self, row: int, count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The `count` best, best first, equals by token id."""
        if self._top is None or count == 0:
            return (), ()
        ids, values = (np.array(array[row]) for array in self._top)
        order = np.lexsort((ids, -values))[:count]
        return tuple(ids[order].tolist()), tuple(np.maximum(values[order], MIN_LOGPROB).tolist())
