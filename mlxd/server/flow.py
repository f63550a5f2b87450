"""Flow control of one connection, both ways.

It does not know HTTP: it moves bytes, counts them, and says when to wait.
"""

from __future__ import annotations

import asyncio


class FlowControl:
    """Wraps the transport's buffers.

    Writing: `write()` never waits. When the unsent bytes exceed the high-water mark the transport calls
    `pause_writing()`; from then on a writer that has seen `write_paused` awaits `drain()`. Nothing is
    allocated for it while the reader keeps up.
    Reading: `pause_reading()` and `resume_reading()` may be called any number of times.
    """

    __slots__ = (
        "_progress_time",
        "_resumed",
        "_taken_bytes",
        "read_paused",
        "transport",
        "write_paused",
        "written_bytes",
    )

    def __init__(self, transport: asyncio.Transport, *, write_buffer_bytes: int, now: float) -> None:
        self.transport = transport
        self.written_bytes = 0
        self.write_paused = False
        self.read_paused = False
        self._resumed: asyncio.Event | None = None
        self._taken_bytes = 0
        self._progress_time = now
        transport.set_write_buffer_limits(high=write_buffer_bytes)

    def write(self, data: bytes) -> None:
        self.written_bytes += len(data)
        self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the unsent bytes are below the low-water mark, or the connection is gone."""
        if self._resumed is not None:
            await self._resumed.wait()

    def pause_writing(self) -> None:
        self.write_paused = True
        self._resumed = asyncio.Event()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    def pause_reading(self) -> None:
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def is_stalled(self, now: float, timeout_seconds: float) -> bool:
        """Whether bytes wait and the peer has taken none for `timeout_seconds`.

        Progress is noted when this is called, so the answer is exact to one interval between calls. Bytes
        taken are bytes written less bytes unsent, because the application may add while the peer takes.
        """
        unsent_bytes = self.transport.get_write_buffer_size()
        taken_bytes = self.written_bytes - unsent_bytes
        if unsent_bytes == 0 or taken_bytes > self._taken_bytes:
            self._taken_bytes = taken_bytes
            self._progress_time = now
            return False
        return now - self._progress_time >= timeout_seconds
