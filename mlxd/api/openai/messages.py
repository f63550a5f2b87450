"""Chat messages as clients send them, into what a chat template renders.

It does not know templates or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxd.api.openai.schema import ROLES, ChatMessage, ContentPart
from mlxd.errors import InvalidRequestError

TemplateMessage = dict[str, Any]


def template_messages(messages: Sequence[ChatMessage]) -> list[TemplateMessage]:
    """`{"role", "content", …}` for each message. Content stays a string, or text parts.

    Raises:
        InvalidRequestError: no messages, an unknown role, content missing or of a kind that text models lack.
    """
    if not messages:
        raise InvalidRequestError("messages: at least one is needed", param="messages")
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: ChatMessage, where: str) -> TemplateMessage:
    role = message.role
    if role not in ROLES:
        raise InvalidRequestError(
            f"{where}.role: expected one of {', '.join(ROLES)}, got {role[:100]!r}",
            param=f"{where}.role",
        )
    if message.content is None and role != "assistant":
        raise InvalidRequestError(f"{where}.content: missing", param=f"{where}.content")
    if message.tool_calls and role != "assistant":
        raise InvalidRequestError(
            f"{where}.tool_calls: only an assistant message has them", param=f"{where}.tool_calls"
        )
    result: TemplateMessage = {"role": role}
    if isinstance(message.content, list):
        result["content"] = [
            {"type": "text", "text": _part_text(part, f"{where}.content[{i}]")}
            for i, part in enumerate(message.content)
        ]
    else:
        result["content"] = message.content if message.content is not None else ""
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments or "{}"},
            }
            for call in message.tool_calls
        ]
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        result["reasoning_content"] = reasoning
    return result


def _part_text(part: ContentPart, where: str) -> str:
    if part.type not in ("text", "refusal"):
        raise InvalidRequestError(
            f"{where}: this model reads text only, not {part.type[:100]!r}", param=f"{where}.type"
        )
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise InvalidRequestError(f"{where}.{part.type}: missing", param=f"{where}.{part.type}")
    return text
