"""An MCP server within the test: a client of the official package's shape, without the package."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from mlxd.mcp.connection import McpConnection, State
from mlxd.mcp.servers_file import McpServerSpec


@dataclass
class Block:
    data: dict[str, Any]

    def model_dump(self, **options: Any) -> dict[str, Any]:
        assert options == {"mode": "json", "by_alias": True, "exclude_none": True}
        return self.data


@dataclass
class Result:
    content: list[Block]
    structured_content: Any = None
    is_error: bool = False


@dataclass
class Tool:
    name: str
    description: str | None = "A tool."
    input_schema: dict[str, Any] = field(default_factory=lambda: {"type": "object"})


@dataclass
class Page:
    tools: list[Tool]
    next_cursor: str | None = None


def text(words: str, **fields: Any) -> Result:
    return Result([Block({"type": "text", "text": words})], **fields)


@dataclass
class FakeServer:
    """`open_client` is what a McpConnection opens. Each of `opens` is how one attempt goes: an exception,
    or None for a connection. The last one counts for all that follow."""

    pages: list[list[str]] = field(default_factory=lambda: [["add"]])
    opens: list[Exception | None] = field(default_factory=lambda: [None])
    answer: Callable[[str, dict[str, Any]], Any] = lambda name, arguments: text(f"{name} {arguments}")
    num_opened: int = 0
    num_closed: int = 0
    num_listed: int = 0
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    on_lost: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def open_client(self, spec: McpServerSpec, on_lost: Callable[[], None]) -> AsyncIterator[Any]:
        self.num_opened += 1
        self.on_lost = on_lost
        outcome = self.opens.pop(0) if len(self.opens) > 1 else self.opens[0]
        if outcome is not None:
            raise outcome
        try:
            yield self
        finally:
            self.num_closed += 1

    async def list_tools(self, *, cursor: str | None) -> Page:
        self.num_listed += 1
        index = int(cursor or 0)
        more = index + 1 < len(self.pages)
        return Page([Tool(name) for name in self.pages[index]], str(index + 1) if more else None)

    async def call_tool(self, name: str, arguments: dict[str, Any], *, read_timeout_seconds: float) -> Result:
        self.calls.append((name, arguments))
        answer = self.answer(name, arguments)
        if asyncio.isfuture(answer):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        result: Result = answer
        return result


async def until_tried(connection: McpConnection) -> None:
    """Until the first attempt to connect has gone well or not."""
    async with asyncio.timeout(10):
        while connection.state is not State.CONNECTED and connection.error is None:
            await asyncio.sleep(0)
