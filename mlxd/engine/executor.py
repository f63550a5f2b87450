"""Starts the worker process, talks to it, and says when it is gone.

It does not know requests or plans' contents, and never decides about a restart: the engine does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Protocol

import msgspec

from mlxd.config import Config, LimitsConfig
from mlxd.step import HEADER_BYTES, MAX_MESSAGE_BYTES, FromWorker, Role, Shutdown, ToWorker, WorkerInit

logger = logging.getLogger(__name__)

KILL_AFTER_SECONDS = 5.0
"""How long a worker may take to end after Shutdown, or after it has closed its socket; then it is killed."""


class Executor(Protocol):
    """What the engine needs of a worker: one life of it."""

    async def start(self) -> None:
        """Start the worker and send WorkerInit."""

    @property
    def is_open(self) -> bool:
        """Whether the worker still listens. Its socket closes before its process has ended (`on_exit`)."""

    def send(self, message: ToWorker) -> None:
        """Send, in order; silently dropped when the worker does not listen any more."""

    def kill(self) -> None:
        """End the worker now; `on_exit` follows."""

    async def stop(self) -> None:
        """Ask the worker to leave, wait, kill it if it must be. `on_exit` is not called."""


class ProcessExecutor:
    """The worker as a child process at the other end of a socketpair.

    `on_message` gets every message; `on_exit` is called once with the exit code (negative: signal) when the
    process is gone without having been asked.
    """

    def __init__(
        self,
        config: Config,
        on_message: Callable[[FromWorker], None],
        on_exit: Callable[[int], None],
        *,
        role: Role = "generate",
    ) -> None:
        self._config = config
        self._role = role
        self._on_message = on_message
        self._on_exit = on_exit
        self._encoder = msgspec.msgpack.Encoder()
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._killer: asyncio.TimerHandle | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "mlxd.worker.main",
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    # Ctrl-C in a terminal reaches the front alone; it decides what becomes of the worker.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._transport, _ = await loop.create_unix_connection(
            lambda: MessageReader(self._on_message, self.kill, self._on_closed), sock=ours
        )
        self._watcher = loop.create_task(self._watch(self._process), name="mlxd-worker-watch")
        # The worker runs model code; clients' keys are none of its business.
        config = msgspec.structs.replace(self._config, limits=LimitsConfig())
        self.send(WorkerInit(config=msgspec.to_builtins(config), role=self._role))

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: ToWorker) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        payload = self._encoder.encode(message)
        self._transport.write(len(payload).to_bytes(HEADER_BYTES, "little") + payload)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def stop(self) -> None:
        self._stopping = True
        if self._process is None:
            return
        self.send(Shutdown())
        try:
            await asyncio.wait_for(self._process.wait(), KILL_AFTER_SECONDS)
        except TimeoutError:
            logger.warning("worker did not leave in %g s; killing it", KILL_AFTER_SECONDS)
            self.kill()
            await self._process.wait()
        if self._watcher is not None:
            await self._watcher

    def _on_closed(self) -> None:
        """It is leaving, and nothing comes of it any more; what it does on the way (in a driver) may hang."""
        if self._process is not None and self._process.returncode is None and not self._stopping:
            self._killer = asyncio.get_running_loop().call_later(KILL_AFTER_SECONDS, self.kill)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if self._killer is not None:
            self._killer.cancel()
        # The socket may still hold its last words (WorkerFailure): let them be read before it is closed.
        await asyncio.sleep(0.05)
        if self._transport is not None:
            self._transport.close()
        if not self._stopping:
            self._on_exit(code)


class MessageReader(asyncio.Protocol):
    """Cuts the byte stream into messages. A malformed one ends the worker: what follows cannot be trusted."""

    def __init__(
        self,
        on_message: Callable[[FromWorker], None],
        on_garbage: Callable[[], None],
        on_closed: Callable[[], None],
    ) -> None:
        self._on_message = on_message
        self._on_garbage = on_garbage
        self._on_closed = on_closed
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._buffer = bytearray()

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_closed()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            size = int.from_bytes(buffer[start : start + HEADER_BYTES], "little")
            if size > MAX_MESSAGE_BYTES:
                self._give_up(f"a message of {size} bytes")
                return
            end = start + HEADER_BYTES + size
            if len(buffer) < end:
                break
            try:
                message = self._decoder.decode(bytes(buffer[start + HEADER_BYTES : end]))
            except msgspec.DecodeError as error:
                self._give_up(str(error))
                return
            start = end
            self._on_message(message)
        del buffer[:start]

    def _give_up(self, reason: str) -> None:
        logger.error("worker sent garbage (%s); killing it", reason)
        self._buffer.clear()
        self._on_garbage()
