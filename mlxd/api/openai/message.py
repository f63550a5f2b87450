"""Neutral events as OpenAI writes them: the deltas of a stream, and the whole message.

It does not know frames, envelopes or sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlxd.chat.types import Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart
from mlxd.engine.request import FinishReason

ROLE_DELTA = {"role": "assistant", "content": ""}
"""The first of each choice."""


def event_delta(event: Event) -> dict[str, Any]:
    """`event` as a `delta`. Reasoning has both of its names: some clients read one, some the other."""
    match event:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning": text, "reasoning_content": text}
        case ToolCallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case ToolCallDelta(index, arguments):
            return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}
        case _:
            return {}


def whole_message(events: Iterable[Event]) -> dict[str, Any]:
    """The message that `events` are. Content is null where there is nothing but calls."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, tuple[ToolCallStart, list[str]]] = {}
    for event in events:
        match event:
            case TextDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCallStart(index):
                calls[index] = (event, [])
            case ToolCallDelta(index, arguments):
                calls[index][1].append(arguments)
    thoughts = "".join(reasoning) or None
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(content) or (None if calls else ""),
        "refusal": None,
        "reasoning": thoughts,
        "reasoning_content": thoughts,
    }
    if calls:
        message["tool_calls"] = [
            {
                "id": start.id,
                "type": "function",
                "function": {"name": start.name, "arguments": "".join(arguments)},
            }
            for start, arguments in calls.values()
        ]
    return message


def finish_reason(reason: FinishReason | None, *, has_calls: bool) -> str | None:
    """OpenAI's word. An answer that was cut off says so, calls or not."""
    return "tool_calls" if has_calls and reason is FinishReason.STOP else reason
