"""Anthropic's tools and tool_choice, in OpenAI's shape, which templates and the rest of mlxd know.

It does not know what becomes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxd.api.anthropic.schema import MessageFields, Tool, ToolChoice
from mlxd.errors import InvalidRequestError


def openai_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """`{"type": "function", "function": {name, description, parameters}}` for each.

    Raises:
        InvalidRequestError: a server tool, or one without name or schema.
    """
    return [_openai_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]


def openai_tool_choice(fields: MessageFields) -> str | dict[str, Any]:
    """`auto`, `required`, `none`, or the one function to be called.

    Raises:
        InvalidRequestError: a call is asked for and there is no such tool.
    """
    choice = fields.tool_choice or ToolChoice(type="auto")
    if choice.type in ("auto", "none"):
        return choice.type
    names = [tool.name for tool in fields.tools or ()]
    if not names:
        raise InvalidRequestError("tool_choice: asks for a call, but there are no tools", param="tool_choice")
    if choice.type == "any":
        return "required"
    if choice.name not in names:
        raise InvalidRequestError(
            f"tool_choice.name: there is no tool {choice.name!r}", param="tool_choice.name"
        )
    return {"type": "function", "function": {"name": choice.name}}


def _openai_tool(tool: Tool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidRequestError(
            f"{where}.type: {tool.type[:100]!r} is a tool of Anthropic's; only custom tools can be used here",
            param=f"{where}.type",
        )
    for name in ("name", "input_schema"):
        if not getattr(tool, name):
            raise InvalidRequestError(f"{where}.{name}: missing", param=f"{where}.{name}")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    return {"type": "function", "function": function}
