"""Anthropic's tools and tool_choice, in OpenAI's shape, which templates and the rest of mlxd know.

It does not know what becomes of them; chat/tools.py says what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlxd.api.anthropic.schema import Tool, ToolChoice
from mlxd.errors import InvalidRequestError

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def openai_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """`{"type": "function", "function": {name, description, parameters, strict}}` for each.

    Raises:
        InvalidRequestError: a tool of Anthropic's own, or one without a schema.
    """
    return [_openai_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]


def openai_tool_choice(choice: ToolChoice | None) -> str | dict[str, Any]:
    """`auto`, `required`, `none`, or the one function to be called."""
    if choice is None:
        return "auto"
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return _CHOICES[choice.type]


@contextmanager
def tools_named_as_here() -> Iterator[None]:
    """Errors that name a place in OpenAI's shape name it in Anthropic's."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param is None or not error.param.startswith("tool"):
            raise
        message, param = _renamed(error.message), _renamed(error.param)
        raise InvalidRequestError(message, param=param, code=error.code) from error


def _renamed(text: str) -> str:
    return text.replace(".function.parameters", ".input_schema").replace(".function.", ".")


def _openai_tool(tool: Tool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidRequestError(
            f"{where}.type: {tool.type[:100]!r} is a tool of Anthropic's; only custom tools can be used here",
            param=f"{where}.type",
        )
    if tool.input_schema is None:
        raise InvalidRequestError(f"{where}.input_schema: missing", param=f"{where}.input_schema")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}
