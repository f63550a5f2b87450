"""MCP tools within a chat: which are offered, whose each call is, and running them between answers.

It does not know frames, HTTP or how tools are run: mlxd/mcp runs them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import orjson

from mlxd.api.openai.message import whole_message
from mlxd.api.openai.schema import ChatCompletionRequest, ChatMessage, FunctionCall, ToolCall
from mlxd.chat.types import Event, TextDelta, ToolCallDelta, ToolCallStart
from mlxd.engine.request import FinishReason
from mlxd.errors import InvalidRequestError, McpError, McpNotConfigured
from mlxd.mcp.connection import McpTool
from mlxd.mcp.hub import McpHub
from mlxd.mcp.results import McpResult, error_result


class McpTools(msgspec.Struct, frozen=True):
    """The MCP tools that a chat offers, by the name that the model calls them; `run` are those that the
    server runs itself, the others' calls go to the client."""

    offered: dict[str, McpTool]
    run: frozenset[str]

    def functions(self) -> list[dict[str, Any]]:
        """In the shape of a request's `tools`."""
        return [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
            for name, tool in self.offered.items()
        ]


def read_mcp_tools(fields: ChatCompletionRequest, hub: McpHub | None) -> McpTools | None:
    """The tools of `{"type": "mcp", "server_label", "allowed_tools", "require_approval"}` entries, and of the
    configuration's default servers; None where there are none.

    Raises:
        InvalidRequestError: an entry is wrong, names a server that is not configured, or asks for it together
            with what a chat of several answers cannot give.
        McpNotConfigured: there are no MCP servers at all.
    """
    entries = [
        (f"tools[{i}]", tool)
        for i, tool in enumerate(fields.tools or ())
        if isinstance(tool, dict) and tool.get("type") == "mcp"
    ]
    if hub is None:
        if entries:
            raise McpNotConfigured("tools: there is no MCP configuration (--mcp-config)", param="tools")
        return None
    offered: dict[str, McpTool] = {}
    run: set[str] = set()
    for where, entry in entries:
        tools, is_run = _read_entry(where, entry, hub)
        offered |= tools
        if is_run:
            run |= tools.keys()
    if fields.tool_choice != "none":
        for label in hub.config.default_servers:
            tools = {tool.full_name: tool for tool in hub.connection(label).tools.values()}
            run |= tools.keys() - offered.keys()
            offered = tools | offered
    if not offered and not entries:
        return None
    if run:
        _check_combination(fields)
    return McpTools(offered, frozenset(run))


def _read_entry(where: str, entry: dict[str, Any], hub: McpHub) -> tuple[dict[str, McpTool], bool]:
    label = entry.get("server_label")
    if not isinstance(label, str):
        raise _invalid(f"{where}.server_label", "missing")
    for name in ("server_url", "connector_id", "authorization", "headers"):
        if entry.get(name) not in (None, {}):
            raise _invalid(
                f"{where}.{name}",
                "this server reaches only the MCP servers of its configuration, as that says",
            )
    if all(connection.spec.name != label for connection in hub.connections):
        raise _invalid(f"{where}.server_label", f"there is no MCP server {label[:100]!r}")
    connection = hub.connection(label)
    allowed = entry.get("allowed_tools")
    if isinstance(allowed, dict):
        allowed = allowed.get("tool_names")
    if allowed is not None and not (
        isinstance(allowed, list) and all(isinstance(name, str) for name in allowed)
    ):
        raise _invalid(f"{where}.allowed_tools", "expected a list of names")
    approval = entry.get("require_approval") or "never"
    if approval not in ("never", "always"):
        raise _invalid(f"{where}.require_approval", "expected never or always")
    if not connection.tools:
        raise McpError(f"MCP server {label!r} has no tools now: {connection.error or connection.state}")
    names = connection.tools.keys() if allowed is None else allowed
    unknown = next((name for name in names if name not in connection.tools), None)
    if unknown is not None:
        raise _invalid(f"{where}.allowed_tools", f"{label!r} has no tool {unknown[:100]!r}")
    tools = [connection.tools[name] for name in names]
    return {tool.full_name: tool for tool in tools}, approval == "never"


def _check_combination(fields: ChatCompletionRequest) -> None:
    for name in ("n", "best_of"):
        if (getattr(fields, name) or 1) > 1:
            raise _invalid(name, "only 1 where the server runs MCP tools")
    if fields.logprobs:
        raise _invalid("logprobs", "not where the server runs MCP tools")


def own_tools(tools: Iterable[Any] | None) -> list[Any]:
    """What is left of a request's `tools` without the MCP entries."""
    return [tool for tool in tools or () if not (isinstance(tool, dict) and tool.get("type") == "mcp")]


def later_choice(tool_choice: Any) -> Any:
    """The `tool_choice` of the answers after the first: a call that was forced has been made, so another is
    the model's to decide; but what it may not call it still may not."""
    if not isinstance(tool_choice, dict) or tool_choice.get("type") != "allowed_tools":
        return None
    allowed = tool_choice.get("allowed_tools", tool_choice)
    return {"type": "allowed_tools", "allowed_tools": {**allowed, "mode": "auto"}}


class McpTurn:
    """One answer of the model. Its calls of MCP tools are kept back from the client, unless one of the
    client's own functions is called too, or the answer was cut, or it is the last one that may be: then the
    client gets all of them. `calls` are those to be run, once it is closed."""

    def __init__(self, run: frozenset[str], *, is_last: bool, after_text: bool) -> None:
        """`after_text`: earlier answers of this chat had text, which new text must be parted from."""
        self.calls: list[ToolCall] = []
        self.num_released = 0
        """calls that the client was given"""
        self.has_text = after_text
        self._run = frozenset() if is_last else run
        self._needs_break = after_text
        self._events: list[Event] = []
        self._kept: list[Event] = []
        self._is_clients = False

    def feed(self, events: Iterable[Event]) -> list[Event]:
        """Those of `events` that the client is to see now."""
        visible: list[Event] = []
        for event in events:
            self._events.append(event)
            if isinstance(event, ToolCallStart | ToolCallDelta):
                if isinstance(event, ToolCallStart) and event.name not in self._run:
                    visible += self._release()
                if self._is_clients:
                    visible += self._given([event])
                else:
                    self._kept.append(event)
                continue
            if isinstance(event, TextDelta):
                if self._needs_break:
                    visible.append(TextDelta("\n\n"))
                self._needs_break, self.has_text = False, True
            visible.append(event)
        return visible

    def close(self, reason: FinishReason | None) -> list[Event]:
        """The answer is complete: what the client is still to see."""
        if reason is not FinishReason.STOP:
            return self._release()
        message = whole_message(self._events)
        if not self._is_clients:
            calls = message.get("tool_calls", ())
            self.calls = [
                ToolCall(id=call["id"], type="function", function=FunctionCall(**call["function"]))
                for call in calls
            ]
        return []

    def message(self) -> ChatMessage:
        """The answer as history."""
        message = whole_message(self._events)
        return ChatMessage(
            role="assistant",
            content=message["content"],
            reasoning_content=message["reasoning_content"],
            tool_calls=self.calls,
        )

    def _release(self) -> list[Event]:
        self._is_clients = True
        kept, self._kept = self._kept, []
        return self._given(kept)

    def _given(self, events: list[Event]) -> list[Event]:
        self.num_released += sum(isinstance(event, ToolCallStart) for event in events)
        return events


async def run_calls(
    hub: McpHub, tools: Mapping[str, McpTool], calls: Sequence[ToolCall]
) -> tuple[list[ChatMessage], list[dict[str, Any]]]:
    """Run them side by side: their results as history, and as `mcp_calls` that the client is shown."""
    results = await asyncio.gather(*(_run(hub, tools, call) for call in calls))
    messages: list[ChatMessage] = []
    shown: list[dict[str, Any]] = []
    for call, result in zip(calls, results, strict=True):
        tool = tools[call.function.name]
        messages.append(
            ChatMessage(role="tool", tool_call_id=call.id, name=call.function.name, content=result.text)
        )
        shown.append(
            {
                "id": call.id,
                "server_label": tool.server,
                "name": tool.name,
                "arguments": call.function.arguments,
                "output": result.text,
                "is_error": result.is_error,
            }
        )
    return messages, shown


async def _run(hub: McpHub, tools: Mapping[str, McpTool], call: ToolCall) -> McpResult:
    try:
        arguments: Any = orjson.loads(str(call.function.arguments or "{}"))
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        return error_result("the arguments are no JSON object")
    try:
        return await hub.call(tools[call.function.name], arguments)
    except McpError as error:
        return error_result(error.message)


def _invalid(param: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {problem}", param=param)
