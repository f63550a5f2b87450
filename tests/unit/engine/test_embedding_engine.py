"""The embedding engine over a worker in the test's own process: batches, turns, deaths, ends and limits."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxd.config import Config, EmbeddingsConfig, LimitsConfig
from mlxd.engine.embedding_engine import EmbeddingEngine
from mlxd.engine.embedding_input import EmbeddingInput
from mlxd.engine.embedding_queue import Job
from mlxd.errors import (
    ConfigError,
    GenerationTimeout,
    InternalError,
    MlxdError,
    NotReadyError,
    OverloadedError,
    WorkerError,
)
from mlxd.step import (
    EmbedBatch,
    EmbedderReady,
    EmbedResult,
    ModelFiles,
    Progress,
    WorkerFailure,
)
from tests.unit.engine.conftest import model_folder

__all__ = ["model_folder"]

SIZE = 2


def vector(tokens: list[int]) -> list[float]:
    """What the worker makes of a sequence."""
    return [float(len(tokens)), float(sum(tokens))]


class FakeEmbedder:
    """Implements mlxd.engine.executor.Executor: answers batches, at once or when told."""

    def __init__(self, config: Config, on_message: Any, on_exit: Any, *, folder: Path) -> None:
        self.on_message, self.on_exit, self.folder = on_message, on_exit, folder
        self.batches: list[list[list[int]]] = []
        """sequences of each batch"""
        self.held: list[EmbedResult] = []
        self.hold = False
        self.poison: int | None = None
        """a token that kills the worker"""
        self.alive = True

    @property
    def is_open(self) -> bool:
        return self.alive

    async def start(self) -> None:
        self.later(Progress("load", 1, 2))
        self.later(ModelFiles(str(self.folder)))
        self.later(EmbedderReady(7, "fake", 64, 16, SIZE, False, "cpu", "float32"))

    def send(self, message: Any) -> None:
        if not isinstance(message, EmbedBatch):
            return
        lengths = struct.unpack(f"<{len(message.lengths) // 4}i", message.lengths)
        tokens = list(struct.unpack(f"<{len(message.token_ids) // 4}i", message.token_ids))
        rows = []
        for length in lengths:
            rows.append(tokens[:length])
            del tokens[:length]
        assert not tokens and list(lengths) == sorted(lengths, reverse=True)
        self.batches.append(rows)
        if self.poison is not None and any(self.poison in row for row in rows):
            self.kill()
            return
        values = np.array([vector(row) for row in rows], np.float32)
        values[values == 1000] = np.nan
        result = EmbedResult(message.batch_id, values.tobytes(), 0.5)
        if self.hold:
            self.held.append(result)
        else:
            self.later(result)

    def release(self) -> None:
        self.hold = False
        while self.held:
            self.later(self.held.pop(0))

    def kill(self) -> None:
        if self.alive:
            self.alive = False
            asyncio.get_running_loop().call_soon(self.on_exit, -9)

    async def stop(self) -> None:
        self.alive = False

    def later(self, message: Any) -> None:
        asyncio.get_running_loop().call_soon(lambda: self.alive and self.on_message(message))


class Harness:
    def __init__(self, folder: Path, *, timeout_seconds: float = 300.0, **options: Any) -> None:
        self.workers: list[FakeEmbedder] = []
        self.poison: int | None = None
        self.ready: list[EmbedderReady] = []
        self.failures: list[MlxdError] = []
        self.progress: list[Progress] = []

        def make(config: Config, on_message: Any, on_exit: Any) -> FakeEmbedder:
            worker = FakeEmbedder(config, on_message, on_exit, folder=folder)
            worker.poison = self.poison
            self.workers.append(worker)
            return worker

        config = Config(
            embeddings=EmbeddingsConfig(model="tiny", **options),
            limits=LimitsConfig(timeout_seconds=timeout_seconds),
        )
        self.engine = EmbeddingEngine(
            config,
            on_progress=self.progress.append,
            on_ready=self.ready.append,
            on_failed=self.failures.append,
            clock=lambda: 0.0,
            make_executor=make,
        )

    @property
    def worker(self) -> FakeEmbedder:
        return self.workers[-1]

    def submit(self, *texts: list[int]) -> Job:
        return self.engine.submit([EmbeddingInput(text) for text in texts])


@asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[Harness]:
    harness = Harness(folder, **options)
    with pytest.raises(NotReadyError, match="loading"):
        harness.engine.check_ready()
    await harness.engine.start()
    await until(lambda: bool(harness.ready))
    yield harness
    assert harness.engine.num_waiting == 0 and harness.engine.num_running == 0
    await harness.engine.stop()
    with pytest.raises(NotReadyError, match="shutting down"):
        harness.submit([1])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


Play = Callable[[Harness], Awaitable[None]]


def play(folder: Path, script: Play, **options: Any) -> None:
    async def main() -> None:
        async with running(folder, **options) as harness:
            await script(harness)

    asyncio.run(main())


def text(length: int, token: int = 2) -> list[int]:
    return [token] * length


def test_vectors_come_in_the_order_of_the_inputs(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        texts = [text(3), text(9), text(1, 5), text(9, 7), text(4)]
        vectors = await h.submit(*texts).future
        assert vectors.tolist() == [vector(row) for row in texts]
        assert h.worker.batches == [[text(9, 7), text(9)], [text(4), text(3), text(1, 5)]]
        assert h.engine.stats.num_inputs == 5 and h.engine.stats.num_tokens == 26
        assert h.engine.status()["total_tokens"] == 26 and h.engine.status()["state"] == "ready"
        assert h.progress == [Progress("load", 1, 2)]

    play(model_folder, script, max_batch_tokens=18)


def test_a_batch_counts_its_padding_and_a_long_input_goes_alone(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        await h.submit(text(30), text(8), text(8), text(3), text(2)).future
        assert [[len(row) for row in batch] for batch in h.worker.batches] == [[30], [8, 8], [3, 2]]

    play(model_folder, script, max_batch_tokens=16)


def test_requests_of_one_moment_share_a_batch(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        jobs = [h.submit(text(n)) for n in (2, 5, 1)]
        assert [(await job.future).tolist() for job in jobs] == [[vector(text(n))] for n in (2, 5, 1)]
        assert [[len(row) for row in batch] for batch in h.worker.batches] == [[5, 2, 1]]

    play(model_folder, script)


def test_a_short_request_waits_for_no_more_than_what_the_worker_has(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        h.worker.hold = True
        bulk = h.submit(*[text(4)] * 40)
        await until(lambda: len(h.worker.batches) == 2)
        short = h.submit(text(2, 9))
        h.worker.release()
        await short.future
        assert any(text(2, 9) in batch for batch in h.worker.batches[:4]) and not bulk.future.done()
        await bulk.future

    play(model_folder, script, max_batch_tokens=16)


def test_who_is_gone_is_not_computed(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        h.worker.hold = True
        gone, ended, stays = h.submit(*[text(8)] * 9), h.submit(*[text(8, 3)] * 9), h.submit(text(8, 4))
        await until(lambda: len(h.worker.batches) == 2)
        gone.future.cancel()
        h.engine.end(ended, InternalError("no"))
        await asyncio.sleep(0)
        assert h.engine.num_waiting == 1
        h.worker.release()
        await stays.future
        with pytest.raises(InternalError):
            await ended.future
        assert len(h.worker.batches) == 3
        assert h.engine.stats.num_requests == 3

    play(model_folder, script, max_batch_tokens=16)


def test_a_workers_death_costs_nobody_his_answer(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        h.worker.hold = True
        jobs = [h.submit(*[text(4, token)] * 6) for token in (2, 3)]
        await until(lambda: len(h.worker.batches) == 2)
        h.worker.kill()
        for job, token in zip(jobs, (2, 3), strict=True):
            assert (await job.future).tolist() == [vector(text(4, token))] * 6
        assert len(h.workers) == 2 and len(h.ready) == 2 and h.engine.status()["restarts"] == 1
        # What was there at the death is tried again by itself.
        assert all(len({row[0] for row in batch}) == 1 for batch in h.worker.batches)

    play(model_folder, script, max_batch_tokens=16)


def test_who_comes_between_a_death_and_its_notice_is_not_tried_alone(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        h.worker.alive = False
        jobs = [h.submit(text(3, 2)), h.submit(text(3, 4))]
        await until(lambda: h.engine.num_waiting == 2)
        await asyncio.sleep(0)
        h.worker.on_exit(-11)
        for job, token in zip(jobs, (2, 4), strict=True):
            assert (await job.future).tolist() == [vector(text(3, token))]
        assert [job.num_attempts for job in jobs] == [1, 1] and len(h.worker.batches) == 1

    play(model_folder, script)


def test_what_kills_the_worker_twice_fails_alone(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxd.engine.supervisor.RESTART_DELAYS_SECONDS", (0.0,))

    async def script(h: Harness) -> None:
        h.poison = h.worker.poison = 13
        jobs = [h.submit(text(3, 2)), h.submit(text(3, 13)), h.submit(text(3, 4))]
        with pytest.raises(WorkerError):
            await jobs[1].future
        assert (await jobs[0].future).tolist() == [vector(text(3, 2))]
        assert (await jobs[2].future).tolist() == [vector(text(3, 4))]
        assert len(h.workers) == 3

    play(model_folder, script)


def test_a_worker_that_keeps_dying_is_given_up_and_generation_goes_on(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxd.engine.supervisor.RESTART_DELAYS_SECONDS", (0.0,))

    async def script(h: Harness) -> None:
        job = h.submit(text(3))
        while h.engine.supervisor.state != "failed":
            h.worker.hold = True
            h.worker.kill()
            await asyncio.sleep(0)
        with pytest.raises((NotReadyError, WorkerError)):
            await job.future
        with pytest.raises(NotReadyError, match="kept failing"):
            h.submit(text(3))
        assert h.failures == []

    async def main() -> None:
        harness = Harness(model_folder)
        await harness.engine.start()
        await until(lambda: bool(harness.ready))
        await script(harness)
        await harness.engine.stop()

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_stops_the_server(model_folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        harness = Harness(model_folder)
        await harness.engine.start()
        harness.worker.on_message(WorkerFailure("no such model", fatal=True))
        harness.worker.kill()
        await until(lambda: bool(harness.failures))
        [failure] = harness.failures
        assert isinstance(failure, ConfigError) and str(failure) == "no such model"
        await harness.engine.stop()

        (tmp_path / "config.json").write_text(json.dumps({"model_type": "fake"}))
        (tmp_path / "tokenizer.json").write_text("{}")
        harness = Harness(tmp_path)
        await harness.engine.start()
        await until(lambda: bool(harness.failures))
        assert isinstance(harness.failures[0], ConfigError) and not harness.ready
        await harness.engine.stop()

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_when_to_come_back(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        await h.submit(text(8)).future  # half a second for eight tokens
        h.worker.hold = True
        # Nobody waits: even one that is larger than the queue is taken.
        bulk = h.submit(*[text(8)] * 12)
        await until(lambda: len(h.worker.batches) == 3)
        with pytest.raises(OverloadedError, match="8 inputs wait") as caught:
            h.submit(text(1))
        assert caught.value.headers == {"retry-after": "4"}
        h.worker.release()
        await bulk.future

    play(model_folder, script, max_batch_tokens=16, max_queue=8)


def test_a_request_may_take_its_time_and_no_longer(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        h.worker.hold = True
        with pytest.raises(GenerationTimeout):
            await h.submit(text(3)).future
        h.worker.release()
        await h.submit(text(3)).future

    play(model_folder, script, timeout_seconds=0.01)


def test_a_vector_that_is_none_is_an_error_of_its_request(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        bad, good = h.submit([1000]), h.submit([1])
        with pytest.raises(InternalError, match="no valid vector"):
            await bad.future
        assert (await good.future).tolist() == [[1.0, 1.0]]

    play(model_folder, script)


def test_a_result_that_answers_nothing_ends_the_worker(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        h.worker.on_message(EmbedResult(99, b""))
        await until(lambda: len(h.ready) == 2)
        assert len(h.workers) == 2

    play(model_folder, script)


def test_at_the_end_everybody_is_told(model_folder: Path) -> None:
    async def script(h: Harness) -> None:
        h.worker.hold = True
        job = h.submit(text(3))
        await until(lambda: len(h.worker.batches) == 1)
        h.engine.end_all(NotReadyError("the server is shutting down"))
        with pytest.raises(NotReadyError):
            await job.future
        with pytest.raises(NotReadyError, match="shutting down"):
            h.submit(text(3))
        h.worker.release()
        await until(lambda: h.engine.num_running == 0)

    play(model_folder, script)
