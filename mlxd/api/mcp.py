"""MCP over HTTP: which servers and tools there are, and running one.

It does not know the protocol; mlxd/mcp does.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mlxd.api.http import HTTPRequest
from mlxd.api.services import Services
from mlxd.errors import InvalidRequestError, McpError, McpNotConfigured
from mlxd.mcp.connection import McpTool
from mlxd.mcp.hub import McpHub
from mlxd.mcp.results import error_result


class McpExecuteRequest(msgspec.Struct, kw_only=True):
    """POST /v1/mcp/execute: `tool_name`, which may hold the server's (`server__tool`); or `server` and
    `tool`."""

    tool_name: str | None = None
    server: str | None = None
    tool: str | None = None
    arguments: dict[str, Any] | None = None


async def list_tools(request: HTTPRequest, services: Services) -> None:
    """The tools of all MCP servers that are connected, each as it can stand in a chat's `tools` too."""
    tools = [_tool(tool) for tool in _hub(services).tools()]
    await request.respond_json(200, {"tools": tools, "count": len(tools)})


async def list_servers(request: HTTPRequest, services: Services) -> None:
    """The configured MCP servers, and how they are."""
    servers = [
        {
            "name": connection.spec.name,
            "state": connection.state,
            "transport": connection.spec.transport,
            "tools_count": len(connection.tools),
            "error": connection.error,
            "restarts": connection.num_restarts,
        }
        for connection in _hub(services).connections
    ]
    await request.respond_json(200, {"servers": servers})


async def execute_tool(request: HTTPRequest, services: Services) -> None:
    """Run a tool. What the tool itself complains of is an answer too, with `is_error`."""
    hub = _hub(services)
    fields = await services.read(request, McpExecuteRequest)
    name = fields.tool_name if fields.tool_name is not None else fields.tool
    if name is None:
        raise InvalidRequestError("tool_name: missing", param="tool_name")
    tool = hub.find(name, fields.server)
    problem = None
    try:
        result = await request.unless_gone(hub.call(tool, fields.arguments or {}))
    except McpError as error:
        problem = error.message
        result = error_result(problem)
    await request.respond_json(
        200,
        {
            "tool_name": name,
            "server": tool.server,
            "tool": tool.name,
            "content": result.text,
            "result": result.blocks,
            "structured_content": result.structured,
            "is_error": result.is_error,
            "error_message": result.text if result.is_error else problem,
        },
    )


def _hub(services: Services) -> McpHub:
    if services.mcp is None:
        raise McpNotConfigured("there is no MCP configuration (--mcp-config, or mcp.config in the YAML)")
    return services.mcp


def _tool(tool: McpTool) -> dict[str, Any]:
    described = {"name": tool.full_name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": described, **described, "server": tool.server}
