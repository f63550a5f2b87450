"""The output pipeline of one answer: text deltas in, neutral events out.

It does not know tokens, requests or dialects; parsers know the model's formats.
"""

from __future__ import annotations

from typing import Protocol

from mlxd.chat.types import Event, TextDelta


class Parser(Protocol):
    """An incremental parser: linear in its input, the same events for every way of cutting the text.

    Events that carry adjacent pieces of the same thing may be cut differently; joined they are the same.
    """

    def feed(self, text: str) -> list[Event]:
        """The events that `text` (never empty) completes."""

    def finish(self) -> list[Event]:
        """The events of whatever was held back, once no more text is coming."""


class OutputPipeline:
    """First the reasoning parser, then the tool parser over the text that the first let through.

    Without parsers, text passes straight through.
    """

    __slots__ = ("_reasoning_parser", "_tool_parser")

    def __init__(self, reasoning_parser: Parser | None = None, tool_parser: Parser | None = None) -> None:
        self._reasoning_parser = reasoning_parser
        self._tool_parser = tool_parser

    def feed(self, text: str) -> list[Event]:
        """The events that a delta completes; none for an empty one."""
        if not text:
            return []
        if self._reasoning_parser is not None:
            return self._parse_tools(self._reasoning_parser.feed(text))
        if self._tool_parser is not None:
            return self._tool_parser.feed(text)
        return [TextDelta(text)]

    def finish(self) -> list[Event]:
        """The events of whatever the parsers held back. To be called once, after the last delta."""
        events: list[Event] = []
        if self._reasoning_parser is not None:
            events = self._parse_tools(self._reasoning_parser.finish())
        if self._tool_parser is not None:
            events += self._tool_parser.finish()
        return events

    def _parse_tools(self, events: list[Event]) -> list[Event]:
        """Runs the text among `events` through the tool parser; the others keep their place."""
        if self._tool_parser is None:
            return events
        parsed: list[Event] = []
        for event in events:
            if isinstance(event, TextDelta):
                parsed += self._tool_parser.feed(event.text)
            else:
                parsed.append(event)
        return parsed
