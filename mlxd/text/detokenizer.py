"""Incremental detokenising: one token in, the text that is now complete out.

It does not know vocabularies or requests: tokens come as pieces (token_pieces.py), one object serves one
sequence. Made by `Tokenizer.detokenizer`.

What all of them promise: the texts that `add` and `finish` return, joined, are `Tokenizer.decode` of all ids,
whatever the ids. With a prompt, they are what decoding prompt and output together adds to the prompt's text
(an unfinished character at the prompt's end belongs to the output). `WindowDetokenizer` promises it only for
decoders that look no further back than a few tokens.

`tokenizers`' own DecodeStream is not used: it fails ("Invalid prefix encountered") on byte-fallback sequences
that turn out to be invalid, has no way to get at what it holds back in the end, and takes longer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from itertools import islice

from mlxd.text.token_pieces import PieceTable

REPLACEMENT = "\ufffd"


class Detokenizer(ABC):
    """Turns one sequence's tokens into text as they come."""

    __slots__ = ()

    @abstractmethod
    def add(self, token_id: int) -> str:
        """Takes the next token; returns the text that it completes, "" while a character is incomplete."""

    @abstractmethod
    def finish(self) -> str:
        """What is still held back, with U+FFFD for what never became a character. To be called once, last."""


class ByteLevelDetokenizer(Detokenizer):
    """Pieces are bytes; the text is their UTF-8, broken sequences replaced as Unicode recommends."""

    __slots__ = ("_pieces", "_tail")

    def __init__(self, pieces: PieceTable, prompt_token_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._tail = b""
        # An incomplete sequence has at most 3 bytes, and UTF-8 shows where characters begin.
        seen = b""
        for token_id in reversed(prompt_token_ids):
            piece = pieces[token_id]
            if piece:
                seen = (piece.encode() if isinstance(piece, str) else piece) + seen
                if len(seen) > 3:
                    break
        self._decode(seen)

    def add(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if not self._tail and isinstance(piece, str):
            return piece
        if piece is None:
            return ""
        return self._decode(piece.encode() if isinstance(piece, str) else piece)

    def finish(self) -> str:
        tail, self._tail = self._tail, b""
        return tail.decode("utf-8", "replace")

    def _decode(self, data: bytes) -> str:
        data = self._tail + data
        text, consumed = utf_8_decode(data, "replace", False)
        self._tail = data[consumed:]
        return text


class ByteFallbackDetokenizer(Detokenizer):
    """Pieces are text, or single bytes where the vocabulary has no token for a character.

    A run of bytes is one unit: valid UTF-8 as a whole, or one U+FFFD for each of its bytes. So it is held
    back until a token of another kind ends it.
    """

    __slots__ = ("_pieces", "_run", "_strip_content", "_strip_count")

    def __init__(
        self, pieces: PieceTable, prompt_token_ids: Sequence[int], strip_content: str, strip_count: int
    ) -> None:
        self._pieces = pieces
        self._strip_content = strip_content
        self._strip_count = strip_count
        self._run = b""
        end = len(prompt_token_ids)
        while end and not isinstance(pieces[prompt_token_ids[end - 1]], str):
            end -= 1
        # Only the beginning of a text is stripped: once the prompt has got past it, nothing of it matters.
        for token_id in islice(prompt_token_ids, end):
            if not self._strip_count:
                break
            self.add(token_id)
        self._run = b""
        for token_id in prompt_token_ids[end:]:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            self._run += piece
            return ""
        if self._run:
            piece = self._end_run() + piece
        return self._strip(piece) if self._strip_count else piece

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        start = 0
        while start < len(text) and start < self._strip_count and text[start] == self._strip_content:
            start += 1
        self._strip_count = self._strip_count - start if start == len(text) else 0
        return text[start:]


class PerTokenDetokenizer(Detokenizer):
    """Pieces are text; only the first token's differs."""

    __slots__ = ("_first_pieces", "_is_first", "_pieces")

    def __init__(self, pieces: PieceTable, first_pieces: PieceTable, prompt_token_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._first_pieces = first_pieces
        self._is_first = all(pieces[token_id] is None for token_id in prompt_token_ids)

    def add(self, token_id: int) -> str:
        piece = (self._first_pieces if self._is_first else self._pieces)[token_id]
        if piece is None:
            return ""
        self._is_first = False
        assert isinstance(piece, str)
        return piece

    def finish(self) -> str:
        return ""


class WindowDetokenizer(Detokenizer):
    """For decoders that nobody took apart: decodes the last few tokens with and without the new ones.

    The window is [context | emitted | held back]. Text that ends in U+FFFD is held back, because more bytes
    may complete it, for MAX_HELD_TOKENS at most.
    """

    CONTEXT_TOKENS = 6
    MAX_HELD_TOKENS = 8

    __slots__ = ("_decode", "_emitted", "_window")

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-self.CONTEXT_TOKENS :])
        self._emitted = len(self._window)

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        held = len(self._window) - self._emitted
        return self._emit(hold_back=held < self.MAX_HELD_TOKENS)

    def finish(self) -> str:
        return self._emit(hold_back=False)

    def _emit(self, hold_back: bool) -> str:
        text = self._decode(self._window)
        if hold_back and text.endswith(REPLACEMENT):
            return ""
        before = self._decode(self._window[: self._emitted])
        del self._window[: max(0, self._emitted - self.CONTEXT_TOKENS)]
        self._emitted = len(self._window)
        return text[len(before) :]
