"""A real `mlxd` process for benchmarks and end-to-end tests: start, wait, look at, stop.

It does not know the server's code: it uses the command line, /health/ready, /v1/status and /proc.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
import yaml

from bench.report import ROOT
from bench.serve.http import Address

URL = re.compile(r"(http://[\w.\[\]:-]+:\d+|unix:/\S+)")
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
POLL_SECONDS = 0.02


class ServerProcess:
    """`mlxd -c` over a configuration given as a dict; a context manager.

    Listens on 127.0.0.1 at a free port unless the configuration says otherwise. `output` is what the
    process has printed so far, both streams together. `probe` allows `objects()`; `profile` is where
    the front writes cProfile's figures when it exits.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        ready_seconds: float = 120.0,
        probe: bool = False,
        profile: Path | None = None,
    ) -> None:
        server = {"host": "127.0.0.1", "port": 0} | config.get("server", {})
        self._config = config | {"server": server}
        self._ready_seconds = ready_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="mlxd-")
        self._probe = Path(self._folder.name) / "probe" if probe else None
        self._profile = profile
        self._lines: list[str] = []
        self.url = ""

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it is ready. Raises RuntimeError, with its output, if it never is."""
        file = Path(self._folder.name) / "server.yaml"
        file.write_text(yaml.safe_dump(self._config))
        inside = ["--probe", str(self._probe)] if self._probe else []
        inside += ["--profile", str(self._profile)] if self._profile else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench._inside", *inside, "--", "-c", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200", "NO_COLOR": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait_until(self._find_url, self._ready_seconds, "its URL")
            self.wait_ready(self._ready_seconds)
        except BaseException:
            self.stop()
            raise

    def stop(self, *, seconds: float = 20.0) -> int:
        """SIGTERM, then SIGKILL where that does not help. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5.0)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._folder.cleanup()
        return self.process.returncode

    @property
    def output(self) -> str:
        return "".join(self._lines)

    @property
    def pid(self) -> int:
        return self.process.pid

    # Over HTTP.

    def get(self, path: str, *, api_key: str | None = None) -> tuple[int, bytes]:
        """Status and body of a GET on a connection of its own."""
        address = Address.parse(self.url)
        connection = http.client.HTTPConnection(address.host, address.port or None, timeout=10)
        if address.unix_socket is not None:
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(10)
            connection.sock.connect(address.unix_socket)
        headers = {"connection": "close"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """/v1/status."""
        code, body = self.get("/v1/status")
        if code != 200:
            raise RuntimeError(f"/v1/status answered {code}: {body[:200]!r}")
        status: dict[str, Any] = orjson.loads(body)
        return status

    def wait_ready(self, seconds: float) -> None:
        """Until /health/ready says 200."""
        self.wait_until(self._is_ready, seconds, "readiness")

    def wait_idle(self, seconds: float = 10.0) -> dict[str, Any]:
        """Until no request runs or waits; returns that status."""
        statuses: list[dict[str, Any]] = []

        def idle() -> bool:
            statuses.append(self.status())
            return is_idle(statuses[-1])

        self.wait_until(idle, seconds, "idleness")
        return statuses[-1]

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll `condition()`. Raises RuntimeError when the time is up or the process is gone."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                self._reader.join(5.0)
                raise RuntimeError(f"mlxd exited with {self.process.returncode}:\n{self.output[-4000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {seconds} s for {what}:\n{self.output[-4000:]}")
            time.sleep(POLL_SECONDS)

    def worker_pid(self) -> int:
        """The pid of the worker that lives now."""
        return int(self.status()["worker"]["pid"])

    def objects(self) -> dict[str, int]:
        """Live objects inside the front by class, see bench._inside; needs `probe=True`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(10)
            probe.connect(str(self._probe))
            counts: dict[str, int] = orjson.loads(b"".join(iter(lambda: probe.recv(65536), b"")))
            return counts

    # From /proc (Linux).

    def rss_bytes(self) -> int:
        """Resident memory of the front."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE_BYTES

    def num_sockets(self) -> int:
        """Open sockets of the front, listeners and the worker's pair included."""
        count = 0
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                count += os.readlink(link).startswith("socket:")
        return count

    def cpu_seconds(self) -> float:
        """User and system CPU time of the front; see `cpu_seconds`."""
        return cpu_seconds(self.pid)

    def _is_ready(self) -> bool:
        try:
            return self.get("/health/ready")[0] == 200
        except OSError:
            return False

    def _find_url(self) -> bool:
        if match := URL.search(self.output):
            self.url = match[1]
        return bool(self.url)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)


def is_idle(status: dict[str, Any]) -> bool:
    """Whether /v1/status shows no request running, waiting or listed."""
    return not (status["num_running"] or status["num_waiting"] or status["requests"])


def cpu_seconds(pid: int) -> float:
    """User and system CPU time of a process, all its threads, in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
