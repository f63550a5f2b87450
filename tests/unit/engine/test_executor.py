"""The real worker process, with the playback backend: it starts, answers, dies and is noticed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxd.config import Config, WorkerConfig
from mlxd.engine import executor as executor_module
from mlxd.engine.executor import MessageReader, ProcessExecutor
from mlxd.step import Flush, FromWorker, Heartbeat, StepResult, WorkerReady

PLAYBACK = Config(worker=WorkerConfig(backend="playback"))


def packed(message: object) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(4, "little") + payload


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_messages_are_whole_however_they_arrive(size: int) -> None:
    got: list[FromWorker] = []
    reader = MessageReader(got.append, lambda: pytest.fail("garbage"), lambda: None)
    sent = [Heartbeat(1, 0.5), StepResult(7, b"\0" * 40), Heartbeat(2, 0.0)]
    data = b"".join(packed(m) for m in sent)
    for start in range(0, len(data), size):
        reader.data_received(data[start : start + size])
    assert got == sent


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", packed(Flush()), b"\x01\0\0\0\xc1"])
def test_garbage_ends_the_worker(data: bytes) -> None:
    got: list[FromWorker] = []
    ended: list[bool] = []
    MessageReader(got.append, lambda: ended.append(True), lambda: None).data_received(data)
    assert ended == [True] and got == []


async def started(on_exit: Callable[[int], None]) -> tuple[ProcessExecutor, list[FromWorker]]:
    got: list[FromWorker] = []
    executor = ProcessExecutor(PLAYBACK, got.append, on_exit)
    await executor.start()
    async with asyncio.timeout(30):
        while not any(isinstance(m, WorkerReady) for m in got):
            await asyncio.sleep(0.01)
    return executor, got


def run(coroutine: Any) -> None:
    asyncio.run(coroutine)


def test_start_and_stop() -> None:
    async def main() -> None:
        executor, _ = await started(lambda code: pytest.fail(f"exit {code} was reported"))
        pid = executor.pid
        assert pid is not None
        await executor.stop()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(main())


def test_death_is_noticed_once() -> None:
    async def main() -> None:
        exits: list[int] = []
        executor, _ = await started(exits.append)
        assert executor.is_open
        executor.kill()
        async with asyncio.timeout(10):
            while executor.is_open:
                await asyncio.sleep(0)
        assert not exits, "the socket closes first"
        async with asyncio.timeout(10):
            while not exits:
                await asyncio.sleep(0.01)
        executor.kill()
        executor.send(Flush())
        await executor.stop()
        assert exits == [-signal.SIGKILL]

    run(main())


def test_a_worker_that_leaves_and_never_ends_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one whose driver hangs: without its socket it is of no use, and would be waited for."""
    hanging = tmp_path / "python"
    hanging.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nos.close(int(sys.argv[-1]))\ntime.sleep(60)\n"
    )
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(executor_module, "KILL_AFTER_SECONDS", 0.0)

    async def main() -> None:
        exits: list[int] = []
        executor = ProcessExecutor(PLAYBACK, lambda message: None, exits.append)
        await executor.start()
        async with asyncio.timeout(30):
            while not exits:
                await asyncio.sleep(0.01)
        assert exits == [-signal.SIGKILL]
        await executor.stop()

    run(main())
