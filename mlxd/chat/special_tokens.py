"""Takes special tokens out of an answer whose detokenising had to keep them, because a parser reads some.

It does not know parsers or tokens: special tokens are texts here, and events have been through the parsers.
"""

from __future__ import annotations

from mlxd.chat.types import Event, ReasoningDelta, TextDelta
from mlxd.text.markers import MarkerScanner


class SpecialTokenFilter:
    """Serves one answer. Arguments of calls are left alone: their parser has read them."""

    __slots__ = ("_held", "_is_thinking", "_scanner")

    def __init__(self, scanner: MarkerScanner) -> None:
        """`scanner` finds the special tokens."""
        self._scanner = scanner
        self._held = ""
        self._is_thinking = False

    def feed(self, events: list[Event]) -> list[Event]:
        """`events` without special tokens."""
        cleaned: list[Event] = []
        for event in events:
            if isinstance(event, TextDelta | ReasoningDelta):
                is_thinking = isinstance(event, ReasoningDelta)
                if is_thinking is not self._is_thinking:
                    cleaned += self.finish()
                    self._is_thinking = is_thinking
                self._add(self._clean(event.text), cleaned)
            else:
                cleaned += self.finish()
                cleaned.append(event)
        return cleaned

    def finish(self) -> list[Event]:
        """What was held back as the possible beginning of a special token."""
        events: list[Event] = []
        self._add(self._held, events)
        self._held = ""
        return events

    def _clean(self, text: str) -> str:
        text = self._held + text
        pieces: list[str] = []
        position = 0
        while True:
            end, marker = self._scanner.scan(text, position)
            pieces.append(text[position:end])
            if not marker:
                self._held = text[end:]
                return "".join(pieces)
            position = end + len(marker)

    def _add(self, text: str, events: list[Event]) -> None:
        if text:
            events.append(ReasoningDelta(text) if self._is_thinking else TextDelta(text))
