"""The embedding engine: takes texts' tokens, keeps the embedding worker busy, hands out vectors.

It does not know HTTP, texts or prompts. Everything here runs on the event loop's thread. A worker's death
costs nothing but time: what it had is sent once more, each request by itself, and only what has been there at
two deaths fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mlxd.config import Config
from mlxd.engine.embedding_input import EmbeddingInput
from mlxd.engine.embedding_queue import Batch, EmbeddingQueue, Job, Vectors
from mlxd.engine.executor import ProcessExecutor
from mlxd.engine.stats import Speed
from mlxd.engine.supervisor import MakeExecutor, WorkerState, WorkerSupervisor
from mlxd.engine.text_loader import TextLoader
from mlxd.errors import (
    GenerationTimeout,
    HTTPStatusError,
    InternalError,
    MlxdError,
    NotReadyError,
    OverloadedError,
    WorkerError,
)
from mlxd.metrics import BATCH_ROWS, REQUEST_SECONDS, TOKENS, Histogram
from mlxd.step import EmbedderReady, EmbedResult, Heartbeat, Progress
from mlxd.step import ModelFiles as ModelFilesMessage
from mlxd.text.model_files import ModelFiles
from mlxd.text.sentence_files import SentenceFiles
from mlxd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_BATCHES_IN_FLIGHT = 2
"""The one the worker computes and the one it has ready; more would only make others wait for it."""
MAX_ATTEMPTS = 2
DEFAULT_RETRY_SECONDS = 2.0
MAX_RETRY_SECONDS = 120.0


@dataclass(slots=True)
class EmbeddingStats:
    """Totals since start."""

    num_requests: int = 0
    """that ended, in whatever way"""
    num_inputs: int = 0
    num_tokens: int = 0
    """computed, without padding"""
    active_memory_bytes: int = 0
    speed: Speed = field(default_factory=Speed)
    request_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    batch_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    batch_inputs: Histogram = field(default_factory=partial(Histogram, BATCH_ROWS))
    batch_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))


start_embedder = partial(ProcessExecutor, role="embed")


def read_text(folder: Path) -> tuple[SentenceFiles, Tokenizer]:
    """What is to be known of the model's texts. Takes long; raises what its three parts do."""
    return SentenceFiles.read(folder), Tokenizer.load(ModelFiles.read(folder))


class EmbeddingEngine:
    """One model, one worker, many requests, which take turns batch by batch.

    `on_progress` is told of loading; `on_ready` when requests are welcome (again); `on_failed` when there
    will be no worker any more (a ConfigError: because of what the operator can change).
    """

    def __init__(
        self,
        config: Config,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_ready: Callable[[EmbedderReady], None] | None = None,
        on_failed: Callable[[MlxdError], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        make_executor: MakeExecutor = start_embedder,
    ) -> None:
        self.config = config.embeddings
        self.info: EmbedderReady | None = None
        self.tokenizer: Tokenizer | None = None
        self.sentence_files: SentenceFiles | None = None
        self.stats = EmbeddingStats()
        self.supervisor = WorkerSupervisor(
            config, self, ready=EmbedderReady, result=EmbedResult, clock=clock, make_executor=make_executor
        )
        self._timeout_seconds = config.limits.timeout_seconds
        self._tell_progress = on_progress
        self._tell_ready = on_ready
        self._tell_failed = on_failed
        self._clock = clock
        self._stopping = False
        self._queue = EmbeddingQueue(config.embeddings.max_batch_tokens)
        self._jobs: set[Job] = set()
        self._in_flight: deque[Batch] = deque()
        self._text_loader = TextLoader(read_text, on_loaded=self._on_text, on_failed=on_failed)

    # Life

    async def start(self) -> None:
        """Start the worker; returns at once, the model loads in the background."""
        await self.supervisor.start()

    async def stop(self) -> None:
        """End what runs, stop the worker."""
        self.end_all(NotReadyError("the server is shutting down"))
        await self.supervisor.stop()
        self._text_loader.stop()

    def end_all(self, error: HTTPStatusError) -> None:
        """Take no more requests, and end the rest with `error`."""
        self._stopping = True
        self.abort_all(error)

    def check_ready(self) -> None:
        """Raises NotReadyError with the reason unless requests can be taken."""
        if self._stopping:
            raise NotReadyError("the server is shutting down")
        if self.supervisor.state is WorkerState.FAILED:
            raise NotReadyError("the embedding worker kept failing", retry_after=60)
        if not self.is_loaded:
            raise NotReadyError("the embedding model is loading")

    @property
    def is_loaded(self) -> bool:
        """Whether it has been ready once. A worker that restarts takes requests: they wait for it."""
        return self.info is not None and self.tokenizer is not None and self.sentence_files is not None

    @property
    def num_waiting(self) -> int:
        """Inputs that no worker has yet."""
        return self._queue.num_inputs

    @property
    def num_running(self) -> int:
        """Inputs that the worker has."""
        return sum(len(batch.rows) for batch in self._in_flight)

    # Requests

    def submit(self, inputs: Sequence[EmbeddingInput], *, timeout_from: float | None = None) -> Job:
        """Take `inputs`, of which there is one at least, together, or none of them.

        Their time runs since `timeout_from`, by the event loop's clock; None: since now.

        The job's vectors are float32 [len(inputs), size]; a cross-encoder's are scores. Its future fails with
        GenerationTimeout, with WorkerError after two deaths of a worker, or with what `end` was given. Raises
        NotReadyError or OverloadedError.
        """
        self.check_ready()
        self._check_queue(inputs)
        assert self.info is not None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Vectors] = loop.create_future()
        timeout = self._timeout_seconds
        error = GenerationTimeout(f"the request took longer than {timeout:g} s")
        job = Job(
            inputs,
            vectors=np.empty((len(inputs), self.info.size), np.float32),
            future=future,
            arrival_time=self._clock(),
            num_left=len(inputs),
        )
        job.pending = sorted(range(len(inputs)), key=job.length)
        start = loop.time() if timeout_from is None else timeout_from
        timer = loop.call_at(start + timeout, self.end, job, error)
        future.add_done_callback(lambda _: self._forget(job, timer))
        self._jobs.add(job)
        self._queue.add(job)
        # Requests of the same turn of the loop share a batch.
        loop.call_soon(self._pump)
        return job

    def end(self, job: Job, error: HTTPStatusError) -> None:
        """End it early, unless it is done."""
        if not job.future.done():
            job.future.set_exception(error)

    def abort_all(self, error: HTTPStatusError) -> None:
        """End every request with `error`."""
        for job in list(self._jobs):
            self.end(job, error)

    def status(self) -> dict[str, object]:
        """What /v1/status says of it."""
        info, supervisor, stats = self.info, self.supervisor, self.stats
        return {
            "model": self.config.names[0],
            "state": str(supervisor.state),
            "pid": info.pid if info else None,
            "restarts": supervisor.num_restarts,
            "device": info.device if info else None,
            "dtype": info.dtype if info else None,
            "dimensions": info.size if info else None,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "total_requests_processed": stats.num_requests,
            "total_inputs": stats.num_inputs,
            "total_tokens": stats.num_tokens,
            "tokens_per_second": round(stats.speed.tokens_per_second, 1),
        }

    # What the worker says (WorkerListener)

    def on_progress(self, progress: Progress) -> None:
        if self._tell_progress is not None:
            self._tell_progress(progress)

    def on_heartbeat(self, beat: Heartbeat) -> None:
        self.stats.active_memory_bytes = beat.active_memory_bytes

    def on_model_files(self, files: ModelFilesMessage) -> None:
        self._text_loader.load(Path(files.path))

    def on_worker_ready(self, info: EmbedderReady) -> None:
        self.info = info
        self._become_ready()

    def on_worker_lost(self) -> None:
        lost: dict[Job, list[int]] = {}
        for batch in self._in_flight:
            for job, index in batch.rows:
                lost.setdefault(job, []).append(index)
        self._in_flight.clear()
        error = WorkerError("the embedding worker stopped while it computed this answer")
        for job, indices in lost.items():
            if job.future.done():
                continue
            self._queue.remove(job)
            job.num_attempts += 1
            if job.num_attempts > MAX_ATTEMPTS:
                self.end(job, error)
            else:
                job.pending = sorted([*job.pending, *indices], key=job.length)
                self._queue.add(job)

    def on_worker_failed(self, error: MlxdError) -> None:
        self._in_flight.clear()
        self.abort_all(NotReadyError("the embedding worker failed", retry_after=60))
        if not self.is_loaded and self._tell_failed is not None:
            self._tell_failed(error)

    def on_result(self, result: EmbedResult) -> None:
        batch = self._in_flight.popleft() if self._in_flight else None
        assert self.info is not None
        size = self.info.size
        if (
            batch is None
            or batch.batch_id != result.batch_id
            or len(result.vectors) != 4 * size * len(batch.rows)
        ):
            self.supervisor.kill(f"result {result.batch_id} answers no batch")
            return
        vectors = np.frombuffer(result.vectors, np.float32).reshape(-1, size)
        is_valid = np.isfinite(vectors.sum(axis=1))
        self._count_batch(batch, result)
        for row, (job, index) in enumerate(batch.rows):
            if not is_valid[row]:
                self.end(job, InternalError("the model gave no valid vector"))
            job.vectors[index] = vectors[row]
            job.num_left -= 1
            if not job.num_left and not job.future.done():
                job.future.set_result(job.vectors)
        self._pump()

    # Within

    def _on_text(self, loaded: tuple[SentenceFiles, Tokenizer]) -> None:
        self.sentence_files, self.tokenizer = loaded
        self._become_ready()

    def _become_ready(self) -> None:
        if self.is_loaded and self.supervisor.state is WorkerState.READY:
            assert self.info is not None
            if self._tell_ready is not None:
                self._tell_ready(self.info)
            self._pump()

    def _check_queue(self, inputs: Sequence[EmbeddingInput]) -> None:
        limit, queue = self.config.max_queue, self._queue
        if queue.num_inputs and queue.num_inputs + len(inputs) > limit:
            speed = self.stats.speed.tokens_per_second
            seconds = queue.num_tokens / speed if speed else DEFAULT_RETRY_SECONDS
            raise OverloadedError(
                f"the queue is full: {queue.num_inputs} inputs wait (limit: {limit})",
                retry_after=min(seconds, MAX_RETRY_SECONDS),
            )

    def _pump(self) -> None:
        supervisor = self.supervisor
        while (
            self._queue
            and supervisor.state is WorkerState.READY
            and supervisor.is_listening
            and self._has_room()
        ):
            batch = self._queue.next_batch()
            self._in_flight.append(batch)
            supervisor.send(batch.message())

    def _has_room(self) -> bool:
        """Whether the worker may have one more batch. One that is tried again must be alone there."""
        if not self._in_flight:
            return True
        is_retry = self._queue.head.is_retry or self._in_flight[0].is_retry
        return not is_retry and len(self._in_flight) < MAX_BATCHES_IN_FLIGHT

    def _count_batch(self, batch: Batch, result: EmbedResult) -> None:
        stats, num_tokens = self.stats, batch.num_tokens
        stats.num_inputs += len(batch.rows)
        stats.num_tokens += num_tokens
        stats.active_memory_bytes = result.active_memory_bytes
        stats.speed.observe(num_tokens, result.seconds)
        stats.batch_seconds.observe(result.seconds)
        stats.batch_inputs.observe(len(batch.rows))
        stats.batch_tokens.observe(num_tokens)

    def _forget(self, job: Job, timer: asyncio.TimerHandle) -> None:
        """The job is over: it has its vectors, or an error, or nobody waits for it any more."""
        timer.cancel()
        self._queue.remove(job)
        self._jobs.discard(job)
        self.stats.num_requests += 1
        self.stats.request_seconds.observe(self._clock() - job.arrival_time)
