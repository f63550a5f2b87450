"""The reasoning parser for a model of which nothing is known: the first tag of an answer decides.

It does not know formats: they are given to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxd.chat.reasoning.base import ReasoningEvent, ReasoningFormat, ReasoningParser
from mlxd.chat.types import TextDelta


class AutoParser:
    """Implements ReasoningParser. Only a tag at the very beginning counts: later it is text about tags."""

    __slots__ = ("_beginning", "_chosen", "_formats", "_interrupts", "_is_decided", "_spaces")

    def __init__(self, formats: Sequence[ReasoningFormat], *, interrupts: tuple[str, ...] = ()) -> None:
        """`interrupts` are the markers that begin a tool call."""
        self._formats = formats
        self._interrupts = interrupts
        self._chosen: ReasoningParser | None = None
        self._is_decided = False
        self._spaces: list[str] = []
        self._beginning = ""

    def feed(self, text: str) -> list[ReasoningEvent]:
        if self._is_decided:
            return [TextDelta(text)] if self._chosen is None else self._chosen.feed(text)
        beginning = (self._beginning + text).lstrip()
        if not self._beginning:
            self._spaces.append(text[: len(text) - len(beginning)])
        self._beginning = beginning
        for reasoning_format in self._formats:
            if beginning.startswith(reasoning_format.start):
                self._chosen = reasoning_format.parser(opened=False, interrupts=self._interrupts)
        if self._chosen is None and any(f.start.startswith(beginning) for f in self._formats):
            return []
        return self._decide()

    def finish(self) -> list[ReasoningEvent]:
        events = [] if self._is_decided else self._decide()
        return events if self._chosen is None else events + self._chosen.finish()

    def _decide(self) -> list[ReasoningEvent]:
        self._is_decided = True
        text = "".join(self._spaces) + self._beginning
        return self.feed(text) if text else []
