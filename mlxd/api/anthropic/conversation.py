"""Anthropic's turns and blocks, into the messages that chat templates know, which are OpenAI's.

It does not know templates or tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile
from typing import Any

import msgspec

from mlxd.api.anthropic.schema import (
    Block,
    DocumentBlock,
    ImageBlock,
    Message,
    MessageFields,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
)
from mlxd.errors import InvalidRequestError

TemplateMessage = dict[str, Any]

BILLING_HEADER = "x-anthropic-billing-header:"
"""Begins a line that agents put first in their system prompt. It differs in every request, so that no prompt
with it in would ever be found in the prefix cache."""

ERROR_PREFIX = "Error: "
"""Tells the model what `is_error` says; templates have no other place for it."""

_ALLOWED: dict[str, tuple[type, ...]] = {
    "system": (TextBlock,),
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
}


def template_messages(fields: MessageFields) -> list[TemplateMessage]:
    """`{"role", "content", …}` for the system prompt and each turn.

    Neighbours of one role are one turn, as at Anthropic. The results of tools become messages of their own
    before the rest of their turn, because they answer the calls with which the turn before ended.

    Raises:
        InvalidRequestError: no messages, or a block that is in the wrong place or no text.
    """
    if not fields.messages:
        raise InvalidRequestError("messages: at least one is needed", param="messages")
    messages: list[TemplateMessage] = []
    system = _system_text(fields.system)
    if system:
        messages.append({"role": "system", "content": system})
    tool_names: dict[str, str] = {}
    for role, turn in groupby(enumerate(fields.messages), key=lambda pair: pair[1].role):
        blocks = [block for i, message in turn for block in _checked_blocks(message, f"messages[{i}]")]
        if role == "assistant":
            messages.append(_assistant_message(blocks, tool_names))
        else:
            messages += _tool_messages(blocks, tool_names)
            texts = [block for block in blocks if isinstance(block, TextBlock)]
            if texts or not blocks:
                messages.append({"role": role, "content": _joined(texts)})
    return messages


def answer_message(content: list[dict[str, Any]]) -> TemplateMessage:
    """An answer's content as the next turn's messages will have it."""
    return _assistant_message(msgspec.convert(content, list[Block]), {})


def continues_answer(fields: MessageFields) -> bool:
    """Whether the last turn is the beginning of the answer.

    Raises:
        InvalidRequestError: there is a call in it, which only a result can follow.
    """
    last = list(takewhile(lambda message: message.role == "assistant", reversed(fields.messages)))
    blocks = [block for message in last if isinstance(message.content, list) for block in message.content]
    if any(isinstance(block, ToolUseBlock) for block in blocks):
        raise InvalidRequestError(
            "messages: the last message has a tool_use, which needs its tool_result", param="messages"
        )
    return bool(last)


def marks_cache_points(fields: MessageFields) -> bool:
    """Whether there is a `cache_control` anywhere."""
    marked: list[MessageFields | Tool | Block] = [fields, *(fields.tools or ())]
    if isinstance(fields.system, list):
        marked += fields.system
    for message in fields.messages:
        if isinstance(message.content, list):
            marked += message.content
            for block in message.content:
                if isinstance(block, ToolResultBlock) and isinstance(block.content, list):
                    marked += block.content
    return any(block.cache_control is not None for block in marked)


def _system_text(system: str | list[TextBlock] | None) -> str:
    texts = [block.text for block in system] if isinstance(system, list) else [system or ""]
    if texts and texts[0].lower().startswith(BILLING_HEADER):
        texts[0] = texts[0].partition("\n")[2]
    return "\n".join(text for text in texts if text)


def _checked_blocks(message: Message, where: str) -> list[Block]:
    content = message.content
    if isinstance(content, str):
        return [TextBlock(text=content)]
    for i, block in enumerate(content):
        place = f"{where}.content[{i}]"
        _check_readable(block, place)
        if not isinstance(block, _ALLOWED[message.role]):
            problem = f"{place}: no place for {_kind(block)} in a message of role {message.role}"
            raise InvalidRequestError(problem, param=place)
        if isinstance(block, ToolResultBlock) and isinstance(block.content, list):
            for k, part in enumerate(block.content):
                _check_readable(part, f"{place}.content[{k}]")
    return content


def _check_readable(block: Block, place: str) -> None:
    if isinstance(block, ImageBlock | DocumentBlock):
        problem = f"{place}: this model reads text only, not content of type {_kind(block)}"
        raise InvalidRequestError(problem, param=place)


def _kind(block: Block) -> str:
    return repr(block.__struct_config__.tag)


def _assistant_message(blocks: Sequence[Block], tool_names: dict[str, str]) -> TemplateMessage:
    """One turn of the model's. Its calls go into `tool_names`, by their ids."""
    message: TemplateMessage = {
        "role": "assistant",
        "content": _joined(block for block in blocks if isinstance(block, TextBlock)),
    }
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.input or {}},
            }
            for call in calls
        ]
        tool_names.update((call.id, call.name) for call in calls)
    thinking = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    if any(thinking):
        message["reasoning_content"] = "\n".join(thinking)
    return message


def _tool_messages(blocks: Sequence[Block], tool_names: dict[str, str]) -> list[TemplateMessage]:
    messages: list[TemplateMessage] = []
    for block in blocks:
        if not isinstance(block, ToolResultBlock):
            continue
        if isinstance(block.content, list):
            content = _joined(part for part in block.content if isinstance(part, TextBlock))
        else:
            content = block.content or ""
        message = {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": ERROR_PREFIX + content if block.is_error else content,
        }
        if block.tool_use_id in tool_names:
            message["name"] = tool_names[block.tool_use_id]
        messages.append(message)
    return messages


def _joined(blocks: Iterable[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)
