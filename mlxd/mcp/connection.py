"""One MCP server: kept connected, started again when it dies, its tools listed, its calls bounded in time.

It does not know other servers, chats or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Any

import msgspec

from mlxd.errors import McpError
from mlxd.mcp.results import McpResult, read_result
from mlxd.mcp.servers_file import McpServerSpec

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
"""for a server to start, shake hands and list its tools; `npx` may download it first"""
REFRESH_SECONDS = 30.0
"""how often the tools are listed anew, which also shows whether the server still answers"""
REFRESH_TIMEOUT_SECONDS = 15.0
MAX_TOOLS = 1024
MAX_PAGES = 100
_CALLABLE_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
"""What a chat takes as a tool's name: one other would have every chat refused that is offered it."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
STABLE_SECONDS = 10.0
"""A connection that lasted this long was a good one: the next pause is the first again."""


class McpTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as its server names it; `full_name` is `server__tool`, under which it is offered."""

    server: str
    name: str
    description: str
    parameters: dict[str, Any]

    @property
    def full_name(self) -> str:
        return f"{self.server}__{self.name}"


class State(StrEnum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    """it will be tried again"""


Open = Callable[[McpServerSpec, Callable[[], None]], AbstractAsyncContextManager[Any]]
"""transport.open_client, or a test's own"""


class McpConnection:
    """Runs as one task, from `start` to `stop`: the package's contexts must end in the task they began in."""

    def __init__(
        self,
        spec: McpServerSpec,
        open_client: Open,
        *,
        max_result_bytes: int,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.spec = spec
        self.state = State.CONNECTING
        self.error: str | None = None
        """why it is not connected, in words fit for clients"""
        self.tools: dict[str, McpTool] = {}
        """by the server's own names"""
        self.num_restarts = 0
        self._open = open_client
        self._max_result_bytes = max_result_bytes
        self._clock = clock
        self._sleep = sleep
        self._hidden: set[str] = set()
        """names that the log has been told of"""
        self._client: Any = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def call(self, name: str, arguments: dict[str, Any], timeout_seconds: float) -> McpResult:
        """Run a tool. What the tool itself complains of is a result with `is_error`.

        A call that was under way when the server died is not made again: it may have had its effect.

        Raises McpError: the server is not connected, refuses the call, dies, or takes too long.
        """
        client = self._client
        if client is None:
            raise McpError(f"MCP server {self.spec.name!r} is {self.state}: {self.error or 'not there yet'}")
        try:
            async with asyncio.timeout(timeout_seconds):
                result = await client.call_tool(name, arguments, read_timeout_seconds=timeout_seconds)
        except TimeoutError:
            raise McpError(f"tool {name!r} took longer than {timeout_seconds:g} seconds") from None
        except Exception as error:
            if self._lost.is_set() or self._client is not client:
                raise McpError(f"MCP server {self.spec.name!r} died during the call") from error
            raise McpError(f"tool {name!r} failed: {describe(error)}") from error
        blocks = [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in result.content]
        return read_result(
            blocks, result.structured_content, is_error=result.is_error, max_bytes=self._max_result_bytes
        )

    async def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            connected_at: float | None = None
            try:
                async with asyncio.timeout(START_SECONDS) as starting:
                    self._lost.clear()
                    async with self._open(self.spec, self._lost.set) as client:
                        await self._list_tools(client)
                        starting.reschedule(None)
                        connected_at = self._connected(client)
                        await self._watch(client)
                self.error = "it ended"
            except TimeoutError:
                self.error = "it did not answer in time"
            except Exception as error:
                self.error = describe(error)
            finally:
                self._client = None
                self.tools = {}
                self.state = State.DISCONNECTED
            if connected_at is not None and self._clock() - connected_at > STABLE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            logger.warning("MCP server %s: %s; connecting again in %g s", self.spec.name, self.error, pause)
            await self._sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self.num_restarts += 1
            self.state = State.CONNECTING

    def _connected(self, client: Any) -> float:
        self._client = client
        self.state, self.error = State.CONNECTED, None
        logger.info("MCP server %s is connected, with %d tools", self.spec.name, len(self.tools))
        return self._clock()

    async def _watch(self, client: Any) -> None:
        """Until the server is lost. Raises when it no longer answers."""
        while True:
            try:
                async with asyncio.timeout(REFRESH_SECONDS):
                    await self._lost.wait()
                return
            except TimeoutError:
                async with asyncio.timeout(REFRESH_TIMEOUT_SECONDS):
                    await self._list_tools(client)

    async def _list_tools(self, client: Any) -> None:
        tools: dict[str, McpTool] = {}
        cursor: str | None = None
        allowed = self.spec.allowed_tools
        for _ in range(MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            for tool in page.tools:
                if (allowed is None or tool.name in allowed) and len(tools) < MAX_TOOLS:
                    found = McpTool(
                        server=self.spec.name,
                        name=tool.name,
                        description=tool.description or "",
                        parameters=tool.input_schema,
                    )
                    if _CALLABLE_NAME.fullmatch(found.full_name):
                        tools[tool.name] = found
                    elif len(self._hidden) < MAX_TOOLS and tool.name not in self._hidden:
                        self._hidden.add(tool.name)
                        logger.warning(
                            "MCP server %s: %.200r is no name for a tool", self.spec.name, tool.name
                        )
            cursor = page.next_cursor
            if cursor is None:
                break
        self.tools = tools


def describe(error: BaseException) -> str:
    """What went wrong, without addresses, which may carry tokens, and without paths."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError):
        return "the command was not found"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code is not None:
        return f"it answered with HTTP status {code}"
    message = getattr(getattr(error, "error", None), "message", None)  # the protocol's own errors
    return message[:500] if isinstance(message, str) else type(error).__name__
