"""All MCP servers of a configuration: started and stopped together, their tools found by name.

It does not know chats or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxd.config import McpConfig
from mlxd.errors import ConfigError, McpError, NotFoundError
from mlxd.mcp.connection import McpConnection, McpTool, Open
from mlxd.mcp.results import McpResult
from mlxd.mcp.servers_file import McpServerSpec, read_servers


class McpHub:
    """Belongs to the event loop that `start` ran on."""

    def __init__(
        self,
        config: McpConfig,
        specs: Sequence[McpServerSpec],
        open_client: Open,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        unknown = sorted(set(config.default_servers) - {spec.name for spec in specs})
        if unknown:
            raise ConfigError(f"mcp.default_servers: there is no server {unknown[0]!r}")
        self.config = config
        self._connections = {
            spec.name: McpConnection(spec, open_client, max_result_bytes=config.max_result_bytes, clock=clock)
            for spec in specs
        }
        self._slots = asyncio.Semaphore(config.max_concurrent_calls)
        self._num_waiting = 0

    @classmethod
    def load(cls, config: McpConfig, environ: Mapping[str, str] = os.environ) -> McpHub | None:
        """What `mcp.config` names; None where it names nothing.

        Raises ConfigError: the file is wrong, or the `mcp` extra is not installed.
        """
        if config.config is None:
            return None
        specs = read_servers(Path(config.config), environ)
        try:
            from mlxd.mcp.transport import open_client  # the package takes a second to import
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"mcp.config needs the package {error.name!r}: pip install 'mlxd[mcp]'"
            ) from None
        # Of a lost connection the package logs three tracebacks, and httpx2 every address: ours is one line.
        logging.getLogger("mcp").setLevel(logging.CRITICAL)
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        return cls(config, specs, open_client)

    def start(self) -> None:
        """Connect to all, in the background."""
        for connection in self._connections.values():
            connection.start()

    async def stop(self) -> None:
        await asyncio.gather(*(connection.stop() for connection in self._connections.values()))

    @property
    def connections(self) -> Sequence[McpConnection]:
        return list(self._connections.values())

    def tools(self) -> Iterator[McpTool]:
        """Of all servers that are connected."""
        for connection in self._connections.values():
            yield from connection.tools.values()

    def connection(self, label: str) -> McpConnection:
        """Raises NotFoundError."""
        found = self._connections.get(label)
        if found is None:
            known = ", ".join(self._connections) or "none"
            raise NotFoundError(f"there is no MCP server {label[:100]!r} (there are: {known})")
        return found

    def find(self, name: str, server: str | None = None) -> McpTool:
        """The tool of that full name (`server__tool`); or of its server's own name, where one server alone
        has it or `server` says which. Raises NotFoundError."""
        label, _, rest = name.partition("__")
        if server is None and rest and label in self._connections:
            tool = self._connections[label].tools.get(rest)
            found = [] if tool is None else [tool]
        else:
            places = self._connections.values() if server is None else [self.connection(server)]
            own = name.removeprefix(f"{server}__")
            found = [place.tools[own] for place in places if own in place.tools]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(tool.full_name for tool in found)
            raise NotFoundError(f"several MCP servers have a tool {name[:100]!r}: {names}")
        raise NotFoundError(f"there is no MCP tool {name[:100]!r} now (GET /v1/mcp/tools lists them)")

    async def call(self, tool: McpTool, arguments: dict[str, Any]) -> McpResult:
        """Raises McpError: it cannot be run, or not in time; time spent waiting for a slot counts."""
        connection = self._connections[tool.server]
        timeout = connection.spec.timeout_seconds or self.config.timeout_seconds
        if self._num_waiting >= self.config.max_concurrent_calls * 4:
            raise McpError("too many MCP tool calls are waiting")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(timeout):
                await self._slots.acquire()
        except TimeoutError:
            raise McpError("no MCP tool call could be started in time") from None
        finally:
            self._num_waiting -= 1
        try:
            return await connection.call(tool.name, arguments, timeout)
        finally:
            self._slots.release()
