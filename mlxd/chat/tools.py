"""Tools as a request names them, in OpenAI's shape: what may be called, and how often.

It does not know how calls are written or read, nor HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from mlxd.chat.types import ToolSpec
from mlxd.errors import InvalidRequestError

MAX_TOOLS = 1024
"""More than any client sends; OpenAI takes 128."""

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

Mode = Literal["none", "auto", "required"]


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What the model may do with its tools.

    `names` are those that it may call, () for all of them. Not `parallel`: one call at most.
    """

    mode: Mode = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True

    def offered(self, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
        """The tools that are shown to the model: those that it may call, and no others."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in tools if not self.names or tool.name in self.names)


FREE_CHOICE = ToolChoice()


def read_tools(tools: Iterable[Any] | None) -> tuple[ToolSpec, ...]:
    """`[{"type": "function", "function": {name, description, parameters, strict}}]`

    Raises:
        InvalidRequestError: naming the place that is wrong; two tools of one name, or too many.
    """
    specs = tuple(_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ()))
    if len(specs) > MAX_TOOLS:
        raise InvalidRequestError(f"tools: at most {MAX_TOOLS}, got {len(specs)}", param="tools")
    seen: set[str] = set()
    for i, spec in enumerate(specs):
        if spec.name in seen:
            raise _invalid(f"tools[{i}].function.name", f"there are two tools {spec.name!r}")
        seen.add(spec.name)
    return specs


def read_tool_choice(choice: Any, tools: Sequence[ToolSpec], *, parallel: bool | None = None) -> ToolChoice:
    """`"none" | "auto" | "required"`, `{"type": "function", "function": {"name"}}`, or
    `{"type": "allowed_tools", "allowed_tools": {"mode", "tools": [that of one function, …]}}`.

    `tools` are the request's. Raises InvalidRequestError, also for a tool that is none of them.
    """
    several = parallel is not False
    if choice is None or choice in ("none", "auto"):
        return ToolChoice(mode="none" if choice == "none" else "auto", parallel=several)
    if choice in ("required", "any"):
        _need_tools(tools)
        return ToolChoice(mode="required", parallel=several)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":  # exactly one call of it, says OpenAI; required is one or more
        return ToolChoice(mode="required", names=(_chosen(choice, "tool_choice", tools),), parallel=False)
    if kind == "allowed_tools":
        return _read_allowed(choice.get("allowed_tools", choice), tools, several)
    raise _invalid(
        "tool_choice",
        "expected none, auto, required, or an object of type function or allowed_tools",
    )


def template_tools(tools: Iterable[ToolSpec]) -> list[dict[str, Any]]:
    """OpenAI's shape, which is what chat templates know."""
    return [{"type": "function", "function": _function(tool)} for tool in tools]


def _function(tool: ToolSpec) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    # Templates iterate over the properties without asking whether there are any.
    parameters = dict(tool.parameters)
    parameters.setdefault("type", "object")
    parameters.setdefault("properties", {})
    return {**function, "parameters": parameters, **tool.extras}


def _read_tool(tool: Any, where: str) -> ToolSpec:
    if not isinstance(tool, Mapping):
        raise _invalid(where, "expected an object")
    function = tool.get("function")
    if tool.get("type", "function") != "function":
        raise _invalid(f"{where}.type", f"only tools of type function, not {str(tool['type'])[:100]!r}")
    if not isinstance(function, Mapping):
        raise _invalid(f"{where}.function", "missing" if function is None else "expected an object")
    where += ".function"
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problem = "missing" if name is None else "expected 1 to 128 letters, digits and any of _ . : / -"
        raise _invalid(f"{where}.name", problem)
    description = function.get("description")
    if not isinstance(description, str | None):
        raise _invalid(f"{where}.description", "expected text")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise _invalid(f"{where}.parameters", "expected a JSON schema, which is an object")
    if parameters and parameters.get("type", "object") != "object":
        raise _invalid(f"{where}.parameters", "arguments are an object, so the schema's type must be too")
    properties = (parameters or {}).get("properties", {})
    if not isinstance(properties, dict):
        raise _invalid(f"{where}.parameters.properties", "expected an object")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise _invalid(f"{where}.strict", "expected true or false")
    known = ("name", "description", "parameters", "strict")
    return ToolSpec(
        name=name,
        description=description,
        parameters=parameters or {},
        strict=strict,
        extras={key: value for key, value in function.items() if key not in known},
    )


def _read_allowed(allowed: Any, tools: Sequence[ToolSpec], parallel: bool) -> ToolChoice:
    where = "tool_choice.allowed_tools"
    if not isinstance(allowed, dict):
        raise _invalid(where, "expected an object")
    mode = allowed.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise _invalid(f"{where}.mode", "expected auto or required")
    chosen = allowed.get("tools")
    if not isinstance(chosen, list) or not chosen:
        raise _invalid(f"{where}.tools", "expected a list with at least one tool")
    names = tuple(_chosen(tool, f"{where}.tools[{i}]", tools) for i, tool in enumerate(chosen))
    return ToolChoice(mode=mode, names=names, parallel=parallel)


def _chosen(choice: Any, where: str, tools: Sequence[ToolSpec]) -> str:
    """The name in `{"function": {"name"}}`, or in `{"name"}` as OpenAI's newer API writes it."""
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _invalid(f"{where}.function.name", "missing")
    if all(tool.name != name for tool in tools):
        raise _invalid(f"{where}.function.name", f"there is no tool {name[:128]!r}")
    return name


def _need_tools(tools: Sequence[ToolSpec]) -> None:
    if not tools:
        raise _invalid("tool_choice", "asks for a call, but there are no tools")


def _invalid(param: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {problem}", param=param)
