"""Reasoning of gpt-oss: the analysis channel of the harmony format.

It does not know tool calls: a message to a tool is left in the text as it is.
"""

from __future__ import annotations

from mlxd.chat.harmony import ANALYSIS, Body, End, HarmonyEvent, HarmonyReader, Header
from mlxd.chat.reasoning.base import ReasoningEvent
from mlxd.chat.types import ReasoningDelta, TextDelta


class GptOssParser:
    """Implements ReasoningParser. Several messages of one kind are joined by a newline."""

    __slots__ = ("_has_text", "_has_thought", "_is_raw", "_is_thinking", "_reader", "_separates")

    def __init__(self, *, in_analysis: bool) -> None:
        self._reader = HarmonyReader(in_body=in_analysis)
        self._is_thinking = in_analysis
        self._is_raw = False
        """the message is to a tool"""
        self._has_text = False
        self._has_thought = False
        self._separates = False
        """a message has ended since the last text or thought"""

    def feed(self, text: str) -> list[ReasoningEvent]:
        return self._events(self._reader.feed(text))

    def finish(self) -> list[ReasoningEvent]:
        return self._events(self._reader.finish())

    def _events(self, read: list[HarmonyEvent]) -> list[ReasoningEvent]:
        events: list[ReasoningEvent] = []
        for event in read:
            match event:
                case Header(channel, recipient, raw):
                    self._separates = True
                    self._is_raw = recipient is not None
                    self._is_thinking = channel == ANALYSIS and recipient is None
                    if self._is_raw:
                        self._write(raw, events)
                case Body(text):
                    if self._is_thinking:
                        self._think(text, events)
                    else:
                        self._write(text, events)
                case End():
                    self._is_thinking = False
                case _:
                    self._write(event.text, events)
        return events

    def _think(self, text: str, events: list[ReasoningEvent]) -> None:
        if self._separates and self._has_thought:
            text = "\n" + text
        self._has_thought = True
        self._separates = False
        events.append(ReasoningDelta(text))

    def _write(self, text: str, events: list[ReasoningEvent]) -> None:
        if self._separates and self._has_text:
            text = "\n" + text
        self._has_text = True
        self._separates = False
        events.append(TextDelta(text))
