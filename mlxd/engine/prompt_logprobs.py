"""The log-probabilities of a prompt's tokens, gathered chunk by chunk.

It does not know steps, requests or who reads them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator

from mlxd.step import PromptLogprobs as StepLogprobs
from mlxd.step import TokenLogprobs

NUMBER_BYTES = 4


class PromptLogprobs:
    """Of prompt tokens 1, 2, …: nothing predicts the first. Iterating gives `TokenLogprobs`, in order.

    They are kept as numbers in arrays, 8 bytes an alternative, because prompts are long.
    """

    __slots__ = ("_logprobs", "_num_top", "_ranks", "_top_logprobs", "_top_token_ids")

    def __init__(self) -> None:
        self._num_top = 0
        self._logprobs = array("f")
        self._ranks = array("i")
        self._top_token_ids = array("i")
        self._top_logprobs = array("f")

    def __len__(self) -> int:
        return len(self._logprobs)

    def __iter__(self) -> Iterator[TokenLogprobs]:
        num_top = self._num_top
        for index, (logprob, rank) in enumerate(zip(self._logprobs, self._ranks, strict=True)):
            top = slice(index * num_top, (index + 1) * num_top)
            yield TokenLogprobs(
                logprob, rank, tuple(self._top_token_ids[top]), tuple(self._top_logprobs[top])
            )

    def extend(self, first: int, part: StepLogprobs, start: int, stop: int, num_top: int) -> bool:
        """Take rows `start` … `stop` - 1 of `part`, which are of prompt token `first` and those after it.

        What is known already (a preempted request computes it again) is passed over; nothing may be missing
        in between. `num_top` of the alternatives are kept, where there are so many. False, and nothing is
        taken, if a number is not one.
        """
        assert first <= len(self) + 1, "prompt tokens were left out"
        start += len(self) + 1 - first
        if start >= stop:
            return True
        logprobs, ranks = array("f"), array("i")
        logprobs.frombytes(_rows(part.logprobs, start, stop))
        if any(map(math.isnan, logprobs)):
            return False
        self._logprobs += logprobs
        ranks.frombytes(_rows(part.ranks, start, stop))
        self._ranks += ranks
        self._num_top = min(num_top, part.num_top)
        for row in range(start, stop):
            top = row * part.num_top, row * part.num_top + self._num_top
            self._top_token_ids.frombytes(_rows(part.top_token_ids, *top))
            self._top_logprobs.frombytes(_rows(part.top_logprobs, *top))
        return True


def _rows(data: bytes, start: int, stop: int) -> bytes:
    return data[NUMBER_BYTES * start : NUMBER_BYTES * stop]
