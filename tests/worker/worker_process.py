"""Starts a real worker process and speaks the front's side of the protocol, blocking."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from mlxd.config import Config
from mlxd.step import FromWorker, Heartbeat, Message, ModelFiles, Progress, Shutdown, WorkerInit
from mlxd.worker.channel import Channel

T = TypeVar("T", bound=Message)
TIMEOUT_SECONDS = 60.0


class Worker:
    """The process and the front's end of its channel."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel[FromWorker]) -> None:
        self.process = process
        self.channel = channel
        self.seen: list[Message] = []
        """Progress and ModelFiles, in order"""

    def receive(self, kind: type[T]) -> T:
        """The next message but for heartbeats, progress and files; it must be a `kind`."""
        while True:
            message = self.channel.receive()
            if isinstance(message, Progress | ModelFiles):
                self.seen.append(message)
            elif not isinstance(message, Heartbeat):
                assert isinstance(message, kind), message
                return message

    def shut_down(self) -> int:
        self.channel.send(Shutdown())
        return self.process.wait(TIMEOUT_SECONDS)


@contextmanager
def worker_process(config: Config, cache: Path) -> Iterator[Worker]:
    """A worker that was sent WorkerInit; killed at the end if it is still there."""
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_SECONDS)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlxd.worker.main", "--fd", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "MLXD_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        )
    channel: Channel[FromWorker] = Channel(ours, FromWorker)  # type: ignore[arg-type]
    try:
        channel.send(WorkerInit(msgspec.to_builtins(config)))
        yield Worker(process, channel)
    finally:
        channel.close()
        if process.poll() is None:
            process.kill()
        process.wait(TIMEOUT_SECONDS)
