"""Shows how loading goes: bars on a terminal, a log line now and then elsewhere.

It does not know what loads, only the Progress messages of the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from mlxd.step import Progress

if TYPE_CHECKING:
    import rich.progress

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 5.0
BYTE_UNITS = ("B", "bytes")
STAGE_TITLES = {
    "resolve": "finding the model",
    "download": "downloading",
    "convert": "converting",
    "load": "loading",
    "warmup": "warming up",
}


class ProgressView(Protocol):
    """Where Progress messages go until the model is ready, or the server stops."""

    def update(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


def progress_view(stream: TextIO, clock: Callable[[], float]) -> ProgressView:
    """Bars if `stream` is a terminal, else log lines. `clock` gives seconds that only grow."""
    return TerminalProgress(stream) if stream.isatty() else LogProgress(clock)


class TerminalProgress:
    """One bar a stage; finished stages stay on the screen."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._stage = ""

    def update(self, progress: Progress) -> None:
        if self._bars is None:
            self._bars = self._open()
        if self._task is None or progress.stage != self._stage:
            self._finish_stage()
            self._stage = progress.stage
            self._task = self._bars.add_task(_title(progress.stage), total=None, count="")
        self._bars.update(
            self._task, completed=progress.done, total=progress.total or None, count=amount(progress)
        )

    def close(self) -> None:
        if self._bars is not None:
            self._finish_stage()
            self._bars.stop()
            self._bars = None

    def _open(self) -> rich.progress.Progress:
        # rich takes 0.1 s to import: only a terminal pays for it, after the server listens.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=Console(file=self._stream),
        )
        bars.start()
        return bars

    def _finish_stage(self) -> None:
        if self._bars is not None and self._task is not None:
            total = self._bars.tasks[self._task].total or 1
            self._bars.update(self._task, total=total, completed=total)
            self._task = None


class LogProgress:
    """A line when a stage begins, then one every LOG_INTERVAL_SECONDS. `subject` begins each."""

    def __init__(self, clock: Callable[[], float], subject: str = "") -> None:
        self._clock = clock
        self._subject = subject
        self._stage = ""
        self._next_line = 0.0

    def update(self, progress: Progress) -> None:
        now = self._clock()
        if progress.stage == self._stage and now < self._next_line:
            return
        self._stage = progress.stage
        self._next_line = now + LOG_INTERVAL_SECONDS
        parts = [self._subject, _title(progress.stage), progress.detail, amount(progress)]
        logger.info("%s", " ".join(part for part in parts if part))

    def close(self) -> None:
        """Nothing is held open."""


def amount(progress: Progress) -> str:
    """`12.0 of 93.1 MB`, `3 of 30 layers`, `3 layers`, or nothing where nothing is counted."""
    done, total, unit = progress.done, progress.total, progress.unit
    if not done and not total:
        return ""
    if unit in BYTE_UNITS:
        size = f"{done / 1e6:.1f}"
        return f"{size} of {total / 1e6:.1f} MB" if total else f"{size} MB"
    counted = f"{done} of {total}" if total else str(done)
    return f"{counted} {unit}".rstrip()


def _title(stage: str) -> str:
    return STAGE_TITLES.get(stage, stage)
