"""A server's process and its children: started, waited for, stopped; CPU time and memory of all of them.

It does not know what is served. Linux only, from /proc.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

from bench.server import PAGE_BYTES, cpu_seconds
from mlxd.worker.platform import find_openblas, find_shim

SAMPLE_SECONDS = 0.25
STOP_SECONDS = 15.0


class ServerUnderTest:
    """A context manager; `port` is free when it starts. Output goes to `log`."""

    def __init__(self, command: list[str], port: int, env: dict[str, str], log: Path) -> None:
        self._command = command
        self._env = env
        self._log = log
        self.port = port
        self.start_seconds = 0.0
        self.peak_bytes = 0
        self._stopped = threading.Event()

    def __enter__(self) -> ServerUnderTest:
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | self._env,
                start_new_session=True,
            )
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._sampler.join()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def wait_healthy(self, path: str, seconds: float) -> None:
        """Until a GET of `path` gives 200. Raises RuntimeError, with the end of its log, if it never does."""
        started = time.monotonic()
        while not self._is_healthy(path):
            gone = self.process.poll() is not None
            if gone or time.monotonic() - started > seconds:
                tail = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{'it exited' if gone else f'not ready in {seconds} s'}:\n{tail}")
            time.sleep(0.1)
        self.start_seconds = time.monotonic() - started

    def cpu_seconds(self) -> float:
        """User and system time of the process and its children so far."""
        total = 0.0
        for pid in self._pids():
            try:
                total += cpu_seconds(pid)
            except OSError:
                continue
        return total

    def rss_bytes(self) -> int:
        total = 0
        for pid in self._pids():
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
            except OSError:
                continue
        return total

    def _pids(self) -> list[int]:
        found, open_ = [], [self.process.pid]
        while open_:
            pid = open_.pop()
            found.append(pid)
            try:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    open_ += [int(child) for child in (task / "children").read_text().split()]
            except OSError:
                continue
        return found

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self.rss_bytes())

    def _is_healthy(self, path: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def blas_environment() -> dict[str, str]:
    """What every server is given: no downloads, and the BLAS of with_blas.py where there is one."""
    env = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    shim, openblas = find_shim(), find_openblas()
    if shim is not None and openblas is not None:
        env |= {"MLXD_BENCH_SHIM": str(shim), "MLXD_BENCH_OPENBLAS": str(openblas)}
    return env


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
