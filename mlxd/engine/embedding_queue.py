"""What waits for the embedding worker, and which of it goes into the next batch.

It does not know the worker, or how a request ends.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from mlxd.engine.embedding_input import EmbeddingInput
from mlxd.step import EmbedBatch

Vectors = npt.NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Job:
    """The inputs of one request. Its `future` gives the vectors; cancelling it drops what is not computed.

    `pending`: indices that no worker has, the longest input last.
    """

    inputs: Sequence[EmbeddingInput]
    vectors: Vectors
    future: asyncio.Future[Vectors]
    arrival_time: float
    num_left: int
    pending: list[int] = field(default_factory=list)
    num_attempts: int = 1

    def length(self, index: int) -> int:
        """Tokens of an input."""
        return len(self.inputs[index].token_ids)

    @property
    def num_pending_tokens(self) -> int:
        return sum(map(self.length, self.pending))

    @property
    def is_retry(self) -> bool:
        """Whether a worker died when it had some of it."""
        return self.num_attempts > 1


@dataclass(frozen=True, slots=True)
class Batch:
    """What the worker has been sent: (job, index of the input)."""

    batch_id: int
    rows: list[tuple[Job, int]]

    @property
    def is_retry(self) -> bool:
        """Of one job only, then."""
        return self.rows[0][0].is_retry

    @property
    def num_tokens(self) -> int:
        return sum(job.length(index) for job, index in self.rows)

    def message(self) -> EmbedBatch:
        """The batch as the worker gets it."""
        inputs = [job.inputs[index] for job, index in self.rows]
        lengths = array("i", (len(item.token_ids) for item in inputs))
        prompts = array("i", (item.num_prompt_tokens for item in inputs))
        token_types = b""
        if any(item.token_types for item in inputs):
            token_types = bytes(
                chain.from_iterable(item.token_types or (0,) * len(item.token_ids) for item in inputs)
            )
        return EmbedBatch(
            self.batch_id,
            lengths=lengths.tobytes(),
            token_ids=array("i", chain.from_iterable(item.token_ids for item in inputs)).tobytes(),
            num_prompt_tokens=prompts.tobytes() if any(prompts) else b"",
            token_types=token_types,
        )


class EmbeddingQueue:
    """Jobs with pending inputs, which take turns. `num_inputs` and `num_tokens` are those pending."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.num_inputs = 0
        self.num_tokens = 0
        self._max_batch_tokens = max_batch_tokens
        self._jobs: deque[Job] = deque()
        self._next_batch_id = 1

    def __bool__(self) -> bool:
        return bool(self._jobs)

    @property
    def head(self) -> Job:
        """The job whose turn it is."""
        return self._jobs[0]

    def add(self, job: Job) -> None:
        """Put it at the end, with what is pending of it."""
        self._jobs.append(job)
        self.num_inputs += len(job.pending)
        self.num_tokens += job.num_pending_tokens

    def remove(self, job: Job) -> None:
        """Whether it is in the queue or not."""
        if job in self._jobs:
            self._jobs.remove(job)
            self.num_inputs -= len(job.pending)
            self.num_tokens -= job.num_pending_tokens

    def next_batch(self) -> Batch:
        """Inputs of the first job in the queue, and where it leaves room, of those after it.

        A job that is not through goes to the end of the queue, so that a short one waits for one batch of
        each of the others at most. A job that was there when a worker died has its batches for itself.
        """
        rows: list[tuple[Job, int]] = []
        limit, longest = self._max_batch_tokens, 0
        for _ in range(len(self._jobs)):
            job = self._jobs[0]
            if rows and (job.is_retry or rows[0][0].is_retry):
                break
            while job.pending:
                width = max(longest, job.length(job.pending[-1]))
                if rows and width * (len(rows) + 1) > limit:
                    break
                longest = width
                rows.append((job, job.pending.pop()))
            if job.pending:
                # The batch is full. Who began it has had its turn; who only filled it up has not.
                if rows[0][0] is job:
                    self._jobs.rotate(-1)
                break
            self._jobs.popleft()
        rows.sort(key=lambda row: row[0].length(row[1]), reverse=True)
        batch = Batch(self._next_batch_id, rows)
        self._next_batch_id += 1
        self.num_inputs -= len(rows)
        self.num_tokens -= batch.num_tokens
        return batch
