"""A process's stderr: its lines reach our log, and whatever goes wrong leaves no pipe open."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from mlxd.mcp.transport import _stderr_log


def test_a_pipe_that_cannot_be_watched_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make_pipe = os.pipe

    def pipe() -> tuple[int, int]:
        made.extend(ends := make_pipe())
        return ends

    async def fail(*_: Any) -> Any:
        raise OSError("no more files can be watched")

    async def main() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "connect_read_pipe", fail)
        monkeypatch.setattr(os, "pipe", pipe)
        with pytest.raises(OSError, match="watched"):
            async with _stderr_log("server"):
                pass
        for end in made:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(end)

    asyncio.run(main())
    assert len(made) == 2
