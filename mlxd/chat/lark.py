"""Texts and patterns in Lark, as llguidance reads it: literals, special tokens, what terminals are made of.

It does not know what they stand for. (https://github.com/guidance-ai/llguidance, docs/syntax.md)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from mlxd.text.markers import MarkerScanner

_LEXEMES = re.compile(r"\A\n|.+", re.DOTALL)
_ESCAPED = re.compile(r"[^\w\s<>\"'`]", re.ASCII)
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

ANY_TEXT = "/(?s:.*)/"


def literal(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text, ensure_ascii=False)


def quoted(text: str) -> str:
    """The regular expression (Rust's) of a text."""
    return "".join(_ESCAPES.get(character) or _quoted(character) for character in text)


def one_of(texts: Iterable[str]) -> str:
    """The terminal of one of some texts, the empty one perhaps."""
    return f"/({'|'.join(map(quoted, texts))})/"


def without(texts: Iterable[str]) -> str:
    """The terminal of all texts in which none of these stands."""
    return f"({ANY_TEXT} & ~/(?s:.*)({'|'.join(map(quoted, texts))})(?s:.*)/)"


class LarkText:
    """Writes texts for one model: special tokens are no text for llguidance, which knows them by id."""

    __slots__ = ("_scanner", "_special_tokens")

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        """`special_tokens` are ids by text."""
        self._special_tokens = special_tokens
        self._scanner = MarkerScanner(special_tokens)

    def text(self, text: str) -> str:
        """A text as part of a rule.

        A line break at its beginning stands for itself: llguidance's lexer takes the longest it can, and
        would be stuck where "\\n" and "\\n</tag>" may both come.
        """
        words: list[str] = []
        for piece, token_id in self._pieces(text):
            words += map(literal, _LEXEMES.findall(piece))
            if token_id is not None:
                words.append(f"<[{token_id}]>")
        return " ".join(words)

    def closed(self, body: str, end: str) -> tuple[str, str]:
        """For a text that goes on to `end`: the terminal of that, and what of `end` follows it in the rule.

        `body` is the text's terminal; it must exclude `end`. Both belong to one terminal, for one of its own
        would have ended only where the text can no longer go on.
        """
        [(piece, token_id), *others] = self._pieces(end) or [("", None)]
        rest = [] if token_id is None else [f"<[{token_id}]>"]
        for text, other in others:
            rest += [literal(text)] if text else []
            rest += [] if other is None else [f"<[{other}]>"]
        return (f"({body}) {literal(piece)}" if piece else body), " ".join(rest)

    def _pieces(self, text: str) -> list[tuple[str, int | None]]:
        """Text, perhaps none, and the special token behind it, which only the last may lack."""
        pieces: list[tuple[str, int | None]] = []
        position = 0
        while position < len(text):
            end, marker = self._scanner.scan(text, position, is_last=True)
            pieces.append((text[position:end], self._special_tokens[marker] if marker else None))
            position = end + len(marker)
        return pieces


def _quoted(character: str) -> str:
    if character.isascii() and not character.isprintable():
        return f"\\x{ord(character):02x}"
    return "\\" + character if character.isascii() and _ESCAPED.match(character) else character
