"""Neutral events into the content blocks of a message.

It does not know frames or JSON; a stream and a whole answer are made from the same blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import msgspec
import orjson

from mlxd.chat.types import Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart

SIGNATURE = "mlxd"
"""Clients want thinking to be signed, and send the signature back. Nothing is proved by it here."""

UNPARSED_INPUT = "INVALID_JSON"
"""The one field of a tool's input that is no JSON object (the answer was cut short), with its text."""


class Kind(enum.Enum):
    """A block's type; `field` is where its deltas' text goes."""

    TEXT = ("text", "text_delta", "text")
    THINKING = ("thinking", "thinking_delta", "thinking")
    TOOL_USE = ("tool_use", "input_json_delta", "partial_json")

    def __init__(self, type_: str, delta_type: str, field: str) -> None:
        self.type = type_
        self.delta_type = delta_type
        self.field = field


class ContentBlock(msgspec.Struct, frozen=True, eq=False):
    """A block that has begun; `index` is its place in the message, `id` and `name` a call's."""

    index: int
    kind: Kind
    id: str = ""
    name: str = ""

    def opening(self) -> dict[str, Any]:
        """The block before its first delta."""
        match self.kind:
            case Kind.TEXT:
                return {"type": "text", "text": ""}
            case Kind.THINKING:
                return {"type": "thinking", "thinking": "", "signature": ""}
            case Kind.TOOL_USE:
                return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}

    def whole(self, text: str) -> dict[str, Any]:
        """The block with all of its text."""
        match self.kind:
            case Kind.TEXT:
                return {"type": "text", "text": text}
            case Kind.THINKING:
                return {"type": "thinking", "thinking": text, "signature": SIGNATURE}
            case Kind.TOOL_USE:
                return {"type": "tool_use", "id": self.id, "name": self.name, "input": _parsed_input(text)}


class ThinkingDisplay(enum.Enum):
    """SHOWN; OMITTED: thinking blocks come without their text; HIDDEN: there are none."""

    SHOWN = enum.auto()
    OMITTED = enum.auto()
    HIDDEN = enum.auto()


class BlockSplitter:
    """Puts each event of one answer into a block: the one that is open, or a new one, which ends that.

    `block` is the open one (None at first); a caller sees by its identity that another has begun.
    """

    __slots__ = ("_display", "_num_blocks", "block", "has_calls")

    def __init__(self, display: ThinkingDisplay = ThinkingDisplay.SHOWN) -> None:
        self._display = display
        self._num_blocks = 0
        self.block: ContentBlock | None = None
        self.has_calls = False

    def place(self, event: Event) -> str:
        """The text that `event` adds to `block`, which it may have opened; "" for none."""
        if isinstance(event, TextDelta):
            if self.block is None or self.block.kind is not Kind.TEXT:
                self._open(Kind.TEXT)
            return event.text
        if isinstance(event, ReasoningDelta):
            if self._display is ThinkingDisplay.HIDDEN:
                return ""
            if self.block is None or self.block.kind is not Kind.THINKING:
                self._open(Kind.THINKING)
            return event.text if self._display is ThinkingDisplay.SHOWN else ""
        if isinstance(event, ToolCallStart):
            self.has_calls = True
            self._open(Kind.TOOL_USE, event.id, event.name)
            return ""
        return event.arguments if isinstance(event, ToolCallDelta) else ""

    def finish(self) -> None:
        """To be called after the last event: a message without a block gets one without text."""
        if self.block is None:
            self._open(Kind.TEXT)

    def _open(self, kind: Kind, id: str = "", name: str = "") -> None:
        self.block = ContentBlock(self._num_blocks, kind, id, name)
        self._num_blocks += 1


def whole_blocks(events: Iterable[Event], splitter: BlockSplitter) -> list[dict[str, Any]]:
    """The content of a message that is complete."""
    texts: dict[ContentBlock, list[str]] = {}
    for event in events:
        text = splitter.place(event)
        if splitter.block is not None:
            texts.setdefault(splitter.block, []).append(text)
    splitter.finish()
    assert splitter.block is not None
    texts.setdefault(splitter.block, [])
    return [block.whole("".join(pieces)) for block, pieces in texts.items()]


def _parsed_input(arguments: str) -> dict[str, Any]:
    if not arguments:
        return {}
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {UNPARSED_INPUT: arguments}
