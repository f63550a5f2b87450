"""Messages as a template wants to see them: parts or strings, arguments as objects, no nulls.

It does not know Jinja; template.py finds out what its template wants and says so in a MessageStyle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxd.errors import InvalidRequestError

Message = dict[str, Any]

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Part type → the field with its text."""

_MEDIA_PARTS = {
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
}
"""OpenAI's part types → the names that templates know."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class MessageStyle:
    """What a template can do with messages.

    `part_roles` are the roles whose content it takes as a list of parts, `string_roles` those it takes as a
    string. `argument_strings`: it wants a tool call's arguments as JSON text instead of an object.
    `developer_role`: it knows that role.
    """

    part_roles: frozenset[str] = frozenset()
    string_roles: frozenset[str] = frozenset()
    argument_strings: bool = False
    developer_role: bool = False


def prepare_messages(messages: Sequence[Message], style: MessageStyle) -> list[Message]:
    """Copies of `messages` that a template of that style renders well; they can be changed freely.

    As in transformers, null fields are left out (templates would print "None"), and reasoning is found under
    each of its names. Raises InvalidRequestError for content that cannot be text where it must be.
    """
    return [_prepare(message, style) for message in messages]


def flatten_content(content: Any) -> str:
    """The text of a message's content: a string, parts, or nothing.

    Text parts are joined by newlines, as vLLM does it. InvalidRequestError for parts that are no text.
    """
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts: list[str] = []
    for part in content:
        text = _part_text(part)
        if text is None:
            raise InvalidRequestError(
                f"this model takes text only, not content of type {part['type']!r}", param="messages"
            )
        texts.append(text)
    return "\n".join(texts)


def _prepare(message: Message, style: MessageStyle) -> Message:
    prepared = {key: value for key, value in message.items() if value is not None}
    role = prepared.get("role")
    if role == "developer" and not style.developer_role:
        role = prepared["role"] = "system"
    content = prepared.get("content")
    if isinstance(content, list):
        prepared["content"] = _parts(content) if role in style.part_roles else flatten_content(content)
    elif isinstance(content, str) and role in style.part_roles and role not in style.string_roles:
        prepared["content"] = [{"type": "text", "text": content}]
    if isinstance(prepared.get("tool_calls"), list):
        prepared["tool_calls"] = [_tool_call(call, style.argument_strings) for call in prepared["tool_calls"]]
    reasoning = next((prepared[name] for name in _REASONING_FIELDS if name in prepared), None)
    if reasoning is not None:
        prepared.setdefault("thinking", reasoning)
        prepared["reasoning_content"] = reasoning
    return prepared


def _parts(content: list[Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for part in content:
        text = _part_text(part)
        if text is not None:
            parts.append({"type": "text", "text": text})
        else:
            parts.append({**part, "type": _MEDIA_PARTS.get(part["type"], part["type"])})
    return parts


def _part_text(part: Any) -> str | None:
    """The part's text; None for a part of another kind. InvalidRequestError for what is no part at all."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequestError("a content part must be an object with a type", param="messages")
    field = _TEXT_PARTS.get(kind)
    if field is None:
        return None
    text = part.get(field)
    if not isinstance(text, str):
        raise InvalidRequestError(f"a content part of type {kind!r} must have {field!r}", param="messages")
    return text


def _tool_call(call: Any, argument_strings: bool) -> Any:
    """A call whose arguments have the form that the template wants.

    Arguments that are no JSON object (a model's slip in the history) stay as they are, so nothing is lost.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if argument_strings:
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
    elif isinstance(arguments, str) or arguments is None:
        arguments = _parse_arguments(arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments}}


def _parse_arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
