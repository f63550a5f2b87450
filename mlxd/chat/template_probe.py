"""What a chat template can do, found out by rendering small conversations with it.

It does not know Jinja or models; template.py hands it a function that renders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlxd.chat.messages import Message, MessageStyle, prepare_messages
from mlxd.errors import InvalidRequestError

Render = Callable[[list[Message], list[dict[str, Any]] | None], str]
"""Prepared messages and tools to a prompt; InvalidRequestError where the template will not have them."""

_PROBE = "mlxd-probe"
_PRINTED_PROBES = (f"'{_PROBE}'", f'"{_PROBE}"')
_TOOL_NAME = "mlxd_probe_tool"
_TOOL = {
    "type": "function",
    "function": {
        "name": _TOOL_NAME,
        "description": "Probes.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "Anything."}},
            "required": ["x"],
        },
    },
}


class TemplateProbe:
    """Asks one template. Every answer costs a few renderings of under a millisecond."""

    __slots__ = ("_render",)

    def __init__(self, render: Render) -> None:
        self._render = render

    def style(self, knows_developer: bool) -> MessageStyle:
        """The form of messages that the template renders well.

        Roles and arguments are asked one after another, each with what is known so far, because a template
        that fails on one message shows nothing of the others. The tool's role comes last: it needs a call.
        """
        style = MessageStyle(developer_role=knows_developer)
        for role in ("user", "assistant", "system"):
            style = self._ask_role(style, role)
        if not self._shows(style, _call({"x": _PROBE})):
            with_strings = replace(style, argument_strings=True)
            if self._shows(with_strings, _call({"x": _PROBE})):
                style = with_strings
        return self._ask_role(style, "tool")

    def supports_system(self, style: MessageStyle) -> bool:
        """Whether a system message gets into the prompt."""
        return self._shows(style, _conversation("system", _PROBE))

    def supports_tools(self, style: MessageStyle) -> bool:
        """Whether tools get into the prompt."""
        return any(
            self._shows(style, _conversation(role, "a"), text=_TOOL_NAME, tools=True)
            for role in ("user", "system")
        )

    def supports_calls(self, style: MessageStyle) -> bool:
        """Whether calls get into the prompt, with their arguments, and so do their results."""
        takes_results = "tool" in style.string_roles | style.part_roles
        return takes_results and self._shows(style, _call({"x": _PROBE}))

    def _ask_role(self, style: MessageStyle, role: str) -> MessageStyle:
        strings = replace(style, string_roles=style.string_roles | {role})
        parts = replace(style, part_roles=style.part_roles | {role})
        messages = _conversation(role, [{"type": "text", "text": _PROBE}])
        takes_strings = self._shows(strings, _conversation(role, _PROBE))
        # In quotes, it is the list as Python or JSON prints it.
        takes_parts = self._shows(parts, messages) and not any(
            self._shows(parts, messages, text=printed) for printed in _PRINTED_PROBES
        )
        return replace(
            style,
            string_roles=strings.string_roles if takes_strings else style.string_roles,
            part_roles=parts.part_roles if takes_parts else style.part_roles,
        )

    def _shows(
        self, style: MessageStyle, messages: list[Message], *, text: str = _PROBE, tools: bool = False
    ) -> bool:
        """Whether the conversation can be rendered and `text` is in the prompt."""
        tools = tools or messages[-1]["role"] == "tool"
        try:
            return text in self._render(prepare_messages(messages, style), [_TOOL] if tools else None)
        except InvalidRequestError:
            return False


def _conversation(role: str, content: object) -> list[Message]:
    """A conversation in which a message of that role has that content."""
    user: Message = {"role": "user", "content": "a"}
    message: Message = {"role": role, "content": content}
    match role:
        case "system":
            return [message, user]
        case "assistant":
            return [user, message, user]
        case "tool":
            *call, result = _call({"x": "y"})
            return [*call, {**result, "content": content}]
        case _:
            return [message]


def _call(arguments: dict[str, str]) -> list[Message]:
    """A conversation with a tool call. The id has nine letters, which Mistral's templates insist on."""
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": _TOOL_NAME, "arguments": arguments},
    }
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "b", "tool_call_id": "abcdefghi", "name": _TOOL_NAME},
    ]
