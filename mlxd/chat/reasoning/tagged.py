"""Reasoning between two tags, as most families write it: `<think>…</think>`.

It does not know which tags, nor whether the prompt has opened the block.
"""

from __future__ import annotations

from mlxd.chat.reasoning.base import CallInThinking, ReasoningEvent
from mlxd.chat.types import ReasoningDelta, TextDelta
from mlxd.text.thinking import Part, Piece, ThinkingSplitter, ThinkingTags


class TaggedParser:
    """Implements ReasoningParser. One block; a tag in the text after it is text."""

    __slots__ = ("_has_text", "_has_thought", "_plain", "_spaces", "_splitter")

    def __init__(self, tags: ThinkingTags) -> None:
        self._splitter = ThinkingSplitter(tags)
        self._has_thought = False
        self._has_text = False
        self._spaces: list[str] = []
        """white space that is reasoning only if more reasoning follows"""
        self._plain = False
        """the rest is text as it is"""

    def feed(self, text: str) -> list[ReasoningEvent]:
        if self._plain:
            return [TextDelta(text)]
        return self._events(self._splitter.feed(text))

    def finish(self) -> list[ReasoningEvent]:
        return self._events(self._splitter.finish())

    def _events(self, pieces: list[Piece]) -> list[ReasoningEvent]:
        events: list[ReasoningEvent] = []
        for part, text in pieces:
            if part is Part.THINKING:
                self._think(text, events)
            elif part is Part.INTERRUPT:
                events.append(CallInThinking(text))
            else:
                self._write(text, events)
        return events

    def _think(self, text: str, events: list[ReasoningEvent]) -> None:
        if not self._has_thought:
            text = text.lstrip()
        stripped = text.rstrip()
        if not stripped:
            self._spaces.append(text)
            return
        self._has_thought = True
        thought = stripped
        if self._spaces:
            thought = "".join(self._spaces) + stripped
            self._spaces = []
        if len(stripped) < len(text):
            self._spaces.append(text[len(stripped) :])
        events.append(ReasoningDelta(thought))

    def _write(self, text: str, events: list[ReasoningEvent]) -> None:
        if not self._has_text and self._splitter.had_block:
            text = text.lstrip()
        if text:
            self._has_text = True
            self._plain = self._splitter.is_over
            events.append(TextDelta(text))
