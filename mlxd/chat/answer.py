"""What one answer has come to, kept while it is streamed.

It does not know dialects: they make their message of the events.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO

from mlxd.chat.types import Event, ReasoningDelta, TextDelta, ToolCallDelta


class AnswerRecord:
    """The events of an answer, adjacent pieces of one thing joined: a few bytes a token.

    `thinks`: there might have been thinking. `is_complete` is for whoever streams it to set, once the answer
    has ended well.
    """

    __slots__ = ("_events", "_open", "_piece", "_thinks", "is_complete")

    def __init__(self, *, thinks: bool) -> None:
        self._thinks = thinks
        self._events: list[Event] = []
        self._open: tuple[type[Event], int] | None = None
        self._piece = StringIO()
        self.is_complete = False

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case TextDelta(text) | ReasoningDelta(text):
                    self._write((type(event), 0), text)
                case ToolCallDelta(index, arguments):
                    self._write((ToolCallDelta, index), arguments)
                case _:
                    self._close()
                    self._events.append(event)

    @property
    def may_be_reworded(self) -> bool:
        """Whether a template may have it in other words than the model, who is kept from thinking by an empty
        block, which templates leave out later like any other."""
        return self._thinks or not all(isinstance(event, TextDelta) for event in self.events())

    def events(self) -> list[Event]:
        """All so far."""
        self._close()
        return list(self._events)

    def _write(self, what: tuple[type[Event], int], text: str) -> None:
        if what != self._open:
            self._close()
            self._open = what
        self._piece.write(text)

    def _close(self) -> None:
        if self._open is None:
            return
        kind, index = self._open
        text = self._piece.getvalue()
        self._events.append(
            ToolCallDelta(index, text)
            if kind is ToolCallDelta
            else TextDelta(text)
            if kind is TextDelta
            else ReasoningDelta(text)
        )
        self._open, self._piece = None, StringIO()
