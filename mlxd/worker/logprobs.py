"""Log-probabilities of the model's raw distribution, at given tokens and the best alternatives.

It does not know how the tokens were chosen, nor whether they are sampled or a prompt's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxd.step import PromptLogprobs, PromptRow, TokenLogprobs
from mlxd.worker.exponential import exp_nonpositive

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's API uses the same number."""

NUM_CANDIDATES = 32
"""Best tokens fetched a row, enough for the API's 20 alternatives and ties with the last of them."""


SUM_WIDTH = 256

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class RankedLogprobs:
    """logits float32 [n, vocab_size], tokens int32 [n] -> what each token's row says of it and of the best.

    `arrays` is all that must be evaluated; the other members wait for it. `num_top` alternatives a row.
    """

    def __init__(self, logits: mx.array, tokens: mx.array, num_top: int) -> None:
        largest = mx.max(logits, axis=-1, keepdims=True)
        normaliser = largest + mx.log(_row_sums(exp_nonpositive(logits - largest)))
        chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)
        self._logprob = (chosen - normaliser).squeeze(-1)
        self._rank = (logits > chosen).sum(axis=-1) + 1
        self.num_top = min(num_top, logits.shape[-1])
        self.arrays = [self._logprob, self._rank]
        self._top: tuple[mx.array, mx.array] | None = None
        if num_top == 1:
            # What evaluation harnesses ask for, thousands of rows at a time.
            ids = mx.argmax(logits, axis=-1, keepdims=True).astype(mx.int32)
            self._top = (ids, largest - normaliser)
        elif num_top:
            size = min(max(num_top, NUM_CANDIDATES), logits.shape[-1])
            ids = mx.argpartition(logits, -size, axis=-1)[:, -size:].astype(mx.int32)
            self._top = (ids, mx.take_along_axis(logits, ids, axis=-1) - normaliser)
        if self._top is not None:
            self.arrays += self._top

    def logprobs(self) -> Floats:
        """[n]; NaN where a logit is."""
        return np.array(self._logprob, dtype=np.float32).clip(MIN_LOGPROB)

    def ranks(self) -> Ints:
        """[n], from 1."""
        return np.array(self._rank, dtype=np.int32)

    def top(self) -> tuple[Ints, Floats]:
        """Token ids and log-probabilities, both [n, num_top]: best first, equals by token id."""
        if self._top is None:
            num_rows = self._logprob.shape[0]
            return np.empty((num_rows, 0), np.int32), np.empty((num_rows, 0), np.float32)
        ids, values = (np.array(array) for array in self._top)
        order = np.lexsort((ids, -values), axis=-1)[:, : self.num_top]
        best: Floats = np.take_along_axis(values, order, axis=-1).clip(MIN_LOGPROB)
        return np.take_along_axis(ids, order, axis=-1), best


def _row_sums(values: mx.array) -> mx.array:
    """float32 [n, m] -> [n, 1], in two stages: on CPUs MLX adds up a row in a few running sums, and a whole
    vocabulary in one go loses 7e-5 of the result, where this loses 4e-7."""
    num_rows, length = values.shape
    width = math.gcd(length, SUM_WIDTH)
    return values.reshape(num_rows, length // width, width).sum(axis=-1).sum(axis=-1, keepdims=True)


class SampledLogprobs:
    """Of sampled tokens: float32 logits [n, vocab_size], int32 tokens [n]; `requests` has, for each of these
    rows, its index among the sampled rows and how many alternatives it asks for."""

    def __init__(self, logits: mx.array, tokens: mx.array, requests: list[tuple[int, int]]) -> None:
        self._requests = requests
        self._ranked = RankedLogprobs(logits, tokens, max(count for _, count in requests))
        self.arrays = self._ranked.arrays

    def result(self, num_rows: int) -> tuple[TokenLogprobs | None, ...]:
        """One entry for each of `num_rows` sampled rows. Waits for the arrays."""
        logprobs, ranks = self._ranked.logprobs().tolist(), self._ranked.ranks().tolist()
        top_ids, top_values = (array.tolist() for array in self._ranked.top())
        entries: list[TokenLogprobs | None] = [None] * num_rows
        for row, (index, count) in enumerate(self._requests):
            entries[index] = TokenLogprobs(
                logprobs[row], ranks[row], tuple(top_ids[row][:count]), tuple(top_values[row][:count])
            )
        return tuple(entries)


class PromptTokenLogprobs:
    """Of prompt tokens: logits [T, vocab_size] in any type, for the T tokens of `rows`."""

    def __init__(self, logits: mx.array, rows: Sequence[PromptRow]) -> None:
        tokens = np.frombuffer(b"".join(row.token_ids for row in rows), dtype="<i4")
        num_top = max(row.num_top for row in rows)
        self._ranked = RankedLogprobs(logits.astype(mx.float32), mx.array(tokens), num_top)
        self.arrays = self._ranked.arrays

    def result(self) -> PromptLogprobs:
        """Waits for the arrays."""
        top_ids, top_values = self._ranked.top()
        return PromptLogprobs(
            num_top=top_ids.shape[1],
            logprobs=self._ranked.logprobs().astype("<f4").tobytes(),
            ranks=self._ranked.ranks().astype("<i4").tobytes(),
            top_token_ids=top_ids.astype("<i4").tobytes(),
            top_logprobs=top_values.astype("<f4").tobytes(),
        )
