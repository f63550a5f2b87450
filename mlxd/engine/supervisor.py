"""Keeps a worker alive: starts it, watches its heartbeat, starts a new one when it dies.

It does not know requests; the listener is told what comes and goes.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from mlxd.config import Config
from mlxd.engine.executor import Executor, ProcessExecutor
from mlxd.errors import ConfigError, MlxdError, WorkerError
from mlxd.step import (
    BlocksFetched,
    BlocksFound,
    BlocksStored,
    DiskReport,
    FromWorker,
    Heartbeat,
    ModelFiles,
    Progress,
    ToWorker,
    WorkerFailure,
)

logger = logging.getLogger(__name__)

CHECK_INTERVAL_SECONDS = 1.0
RESTART_WINDOW_SECONDS = 600.0
RESTART_DELAYS_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0)


class WorkerState(enum.StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


Ready = TypeVar("Ready")
Result = TypeVar("Result")
Ready_contra = TypeVar("Ready_contra", contravariant=True)
Result_contra = TypeVar("Result_contra", contravariant=True)


class WorkerListener(Protocol[Ready_contra, Result_contra]):
    """Who is told. All calls come on the event loop's thread."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_heartbeat(self, beat: Heartbeat) -> None: ...

    def on_model_files(self, files: ModelFiles) -> None: ...

    def on_worker_ready(self, info: Ready_contra, /) -> None: ...

    def on_result(self, result: Result_contra, /) -> None: ...

    def on_worker_lost(self) -> None:
        """The worker is gone and a new one is on its way; nothing that was sent to it will be answered."""

    def on_worker_failed(self, error: MlxdError) -> None:
        """There will be no worker any more. A ConfigError: none before the operator has changed something."""


MakeExecutor = Callable[[Config, Callable[[FromWorker], None], Callable[[int], None]], Executor]


class WorkerSupervisor(Generic[Ready, Result]):
    """One worker at a time, at most `worker.max_restarts` new ones in ten minutes.

    `ready` and `result` are the messages of its role.
    """

    def __init__(
        self,
        config: Config,
        listener: WorkerListener[Ready, Result],
        *,
        ready: type[Ready],
        result: type[Result],
        clock: Callable[[], float],
        make_executor: MakeExecutor = ProcessExecutor,
        on_disk_report: Callable[[DiskReport], None] | None = None,
    ) -> None:
        self.state = WorkerState.STARTING
        self.failure: str | None = None
        self.num_restarts = 0
        self._config = config
        self._listener = listener
        self._ready = ready
        self._result = result
        self._clock = clock
        self._make_executor = make_executor
        self._tell_disk_report = on_disk_report
        self._executor: Executor | None = None
        self._restarts: deque[float] = deque()
        self._restart_task: asyncio.Task[None] | None = None
        self._check_handle: asyncio.TimerHandle | None = None
        self._last_words: WorkerFailure | None = None
        self._last_beat = 0.0
        self._busy_seconds = 0.0

    async def start(self) -> None:
        self._arm_check()
        await self._spawn()

    async def stop(self) -> None:
        """Let the worker leave; after this nothing is called back."""
        if self.state is not WorkerState.FAILED:
            self.state = WorkerState.STOPPED
        if self._check_handle is not None:
            self._check_handle.cancel()
        if self._restart_task is not None:
            self._restart_task.cancel()
        if self._executor is not None:
            await self._executor.stop()
            self._executor = None

    def send(self, message: ToWorker) -> None:
        if self._executor is not None:
            self._executor.send(message)

    @property
    def is_listening(self) -> bool:
        """Whether what is sent now may be answered; not so of a worker whose end is about to be noticed."""
        return self._executor is not None and self._executor.is_open

    def kill(self, reason: str) -> None:
        """End this worker, because of `reason`; a new one is started."""
        logger.error("killing the worker: %s", reason)
        if self._executor is not None:
            self._executor.kill()

    @property
    def heartbeat_age_seconds(self) -> float:
        return self._clock() - self._last_beat

    def health(self) -> tuple[bool, str]:
        """Whether the worker lives and moves; else why not, in words for a client."""
        if self.state is WorkerState.FAILED:
            return False, f"the worker failed: {self.failure}"
        if self.state in (WorkerState.RESTARTING, WorkerState.STOPPED):
            return False, f"the worker is {self.state}"
        limit = self._config.worker.heartbeat_timeout_seconds
        if self.heartbeat_age_seconds > limit:
            return False, f"no heartbeat from the worker for {self.heartbeat_age_seconds:.0f} s"
        if self._busy_seconds > limit:
            return False, f"one step has been running for {self._busy_seconds:.0f} s"
        return True, "ok"

    async def _spawn(self) -> None:
        self._last_words = None
        self._last_beat = self._clock()
        self._busy_seconds = 0.0
        executor = self._make_executor(self._config, self._on_message, self._on_exit)
        self._executor = executor
        self.state = WorkerState.LOADING
        await executor.start()

    def _on_message(self, message: FromWorker) -> None:
        if isinstance(message, self._result):
            self._listener.on_result(message)
            return
        if isinstance(message, self._ready):
            self.state = WorkerState.READY
            self._listener.on_worker_ready(message)
            return
        match message:
            case BlocksFound() | BlocksStored() | BlocksFetched():
                if self._tell_disk_report is not None:
                    self._tell_disk_report(message)
            case Heartbeat():
                self._last_beat = self._clock()
                self._busy_seconds = message.busy_seconds
                self._listener.on_heartbeat(message)
            case Progress():
                self._last_beat = self._clock()
                self._listener.on_progress(message)
            case ModelFiles():
                self._listener.on_model_files(message)
            case WorkerFailure():
                self._last_words = message

    def _on_exit(self, code: int) -> None:
        words = self._last_words
        reason = words.message if words else f"the worker process ended with {_describe_exit(code)}"
        self._go_on(reason, is_fatal=words is not None and words.fatal)

    def _go_on(self, reason: str, *, is_fatal: bool) -> None:
        """Without the worker: a new one is started, unless that has been tried too often."""
        now = self._clock()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_SECONDS:
            self._restarts.popleft()
        self._executor = None
        if is_fatal or len(self._restarts) >= self._config.worker.max_restarts:
            self.state = WorkerState.FAILED
            self.failure = reason
            logger.error("worker failed for good: %s", reason)
            self._listener.on_worker_failed(ConfigError(reason) if is_fatal else WorkerError(reason))
            return
        self.state = WorkerState.RESTARTING
        delay = RESTART_DELAYS_SECONDS[min(len(self._restarts), len(RESTART_DELAYS_SECONDS) - 1)]
        self._restarts.append(now)
        self.num_restarts += 1
        logger.error("worker lost (%s); starting a new one in %g s", reason, delay)
        self._listener.on_worker_lost()
        self._restart_task = asyncio.get_running_loop().create_task(self._respawn(delay))

    async def _respawn(self, delay: float) -> None:
        await asyncio.sleep(delay)
        try:
            await self._spawn()
        except OSError as error:  # no process, file or memory is left for it now
            self._go_on(f"the worker could not be started: {error.strerror}", is_fatal=False)

    def _arm_check(self) -> None:
        loop = asyncio.get_running_loop()
        self._check_handle = loop.call_later(CHECK_INTERVAL_SECONDS, self._check)

    def _check(self) -> None:
        if self._busy_seconds > self._config.worker.step_timeout_seconds:
            self.kill(f"one step has been running for {self._busy_seconds:.0f} s")
            self._busy_seconds = 0.0
        self._arm_check()


def _describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
