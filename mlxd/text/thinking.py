"""Thinking in a growing text: which of it lies between the two tags that a model puts around its thoughts.

It does not know model families (chat/reasoning does), tokens or requests. The engine counts and limits
thinking with it, and the reasoning parsers cut the text with it, so that both mean the same.
"""

from __future__ import annotations

import enum

import msgspec

from mlxd.text.markers import MarkerScanner


class ThinkingTags(msgspec.Struct, frozen=True, kw_only=True):
    """What marks thinking, and where the text begins.

    A block begins with `start`, before which is nothing but white space, or is open where the text begins
    (`opened`: the prompt has opened it; if the model opens it once more, that is no thought). It ends with
    `end`. `interrupts` are texts that end it too, and are not part of it: the beginnings of tool calls.
    `repeats`: after a block, another may come anywhere.
    """

    start: str
    end: str
    opened: bool = False
    interrupts: tuple[str, ...] = ()
    repeats: bool = False


class Part(enum.Enum):
    """What a piece of text is. INTERRUPT: the beginning of a tool call and all that came after it."""

    THINKING = enum.auto()
    TEXT = enum.auto()
    INTERRUPT = enum.auto()


Piece = tuple[Part, str]


class _State(enum.Enum):
    SPACE = enum.auto()
    """nothing but white space so far, and perhaps the beginning of the start tag"""
    INSIDE = enum.auto()
    OUTSIDE = enum.auto()


class ThinkingSplitter:
    """Cuts one text into thinking and text, the tags left out; joined, the same for every way of cutting it.

    After an INTERRUPT the block counts as open still, and nothing interrupts it any more: whoever takes the
    call out feeds what else there is.
    """

    __slots__ = ("_held", "_scanner", "_spaces", "_state", "_tags", "had_block")

    def __init__(self, tags: ThinkingTags) -> None:
        self._tags = tags
        self._state = _State.SPACE
        self._spaces: list[str] = []
        self._held = ""
        """what may be the beginning of a marker"""
        self._scanner = MarkerScanner((tags.start,))
        self.had_block = tags.opened
        """whether a block has begun so far"""

    @property
    def is_thinking(self) -> bool:
        """Whether the next character is a thought, as far as can be known."""
        return self._state is _State.INSIDE or (self._state is _State.SPACE and self._tags.opened)

    @property
    def is_over(self) -> bool:
        """Whether no thinking can follow: all further text is TEXT."""
        return self._state is _State.OUTSIDE and not self._tags.repeats

    def feed(self, text: str) -> list[Piece]:
        """The pieces that `text` completes, none of them empty."""
        if self._state is _State.INSIDE and not self._held and self._scanner.plain.fullmatch(text):
            return [(Part.THINKING, text)]
        pieces: list[Piece] = []
        if self._held:
            text = self._held + text
            self._held = ""
        while text:
            if self._state is _State.SPACE:
                text = self._skip_space(text)
            elif self._state is _State.INSIDE:
                text = self._inside(text, pieces)
            else:
                text = self._outside(text, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back. A block that is still open has been thinking to the end."""
        part = Part.THINKING if self.is_thinking else Part.TEXT
        held = "".join(self._spaces) + self._held
        self._spaces.clear()
        self._held = ""
        return [(part, held)] if held else []

    def _skip_space(self, text: str) -> str:
        """Decides where the text begins, if it can; returns what is still to be looked at."""
        start = self._tags.start
        beginning = text.lstrip()
        if beginning != text:
            self._spaces.append(text[: len(text) - len(beginning)])
        if start.startswith(beginning) and beginning != start:
            self._held = beginning
            return ""
        spaces = "".join(self._spaces)
        self._spaces.clear()
        if beginning.startswith(start):
            self._go_inside()
            return beginning[len(start) :]
        if self._tags.opened:
            self._go_inside()
        else:
            self._state = _State.OUTSIDE
        return spaces + beginning

    def _go_inside(self) -> None:
        self._state = _State.INSIDE
        self.had_block = True
        self._scanner = MarkerScanner((self._tags.end, *self._tags.interrupts))

    def _inside(self, text: str, pieces: list[Piece]) -> str:
        end, marker = self._scanner.scan(text)
        if end:
            pieces.append((Part.THINKING, text[:end]))
        if not marker:
            self._held = text[end:]
            return ""
        if marker == self._tags.end:
            self._state = _State.OUTSIDE
            self._scanner = MarkerScanner((self._tags.start,))
            return text[end + len(marker) :]
        self._scanner = MarkerScanner((self._tags.end,))
        pieces.append((Part.INTERRUPT, text[end:]))
        return ""

    def _outside(self, text: str, pieces: list[Piece]) -> str:
        if not self._tags.repeats:
            pieces.append((Part.TEXT, text))
            return ""
        end, marker = self._scanner.scan(text)
        if end:
            pieces.append((Part.TEXT, text[:end]))
        if marker:
            self._go_inside()
        else:
            self._held = text[end:]
        return text[end + len(marker) :] if marker else ""
