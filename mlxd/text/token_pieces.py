"""Token pieces: what each token of a vocabulary adds to the text, by the decoder that tokenizer.json names.

It does not know requests or streams; detokenizer.py joins the pieces.

A decoder of `tokenizers` turns a list of token strings into text. For the ones that language models use, that
is a function of each token and a little context, so a token's piece can be computed once:

    ByteLevel                                    bytes, to be read as UTF-8 (GPT-2, Llama 3, Qwen, …)
    Replace… ByteFallback Fuse Strip             text, or one byte for "<0x41>" (Llama 2, Mistral, Gemma, …)
    Metaspace, WordPiece, none                   text, which differs for the first token

Anything else is `DecoderKind.OTHER`, and only the decoder itself knows.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers

Piece = str | bytes
"""str: whole text. bytes: not text by itself (part of a UTF-8 sequence, or a byte-fallback token)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class DecoderKind(enum.Enum):
    """How pieces are joined; see the module's docstring."""

    BYTE_LEVEL = enum.auto()
    BYTE_FALLBACK = enum.auto()
    PER_TOKEN = enum.auto()
    OTHER = enum.auto()


@dataclass(frozen=True, slots=True)
class DecoderScheme:
    """A decoder, taken apart.

    `to_piece` is for a token with others before it, `to_first_piece` for one without. Of the joined text, up
    to `strip_count` leading `strip_content` characters are dropped.
    """

    kind: DecoderKind
    to_piece: Callable[[str], Piece]
    to_first_piece: Callable[[str], Piece]
    strip_content: str = ""
    strip_count: int = 0

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer) -> DecoderScheme:
        """Reads the scheme off a tokeniser's decoder."""
        decoder = tokenizer.decoder
        if decoder is None:
            # `tokenizers` then joins the tokens with spaces.
            return cls(DecoderKind.PER_TOKEN, lambda token: " " + token, str)
        state = json.loads(decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        types = [step["type"] for step in steps]
        if types == ["ByteLevel"]:
            to_piece = ByteLevelPiece()
            return cls(DecoderKind.BYTE_LEVEL, to_piece, to_piece)
        if types in (["Metaspace"], ["WordPiece"]):
            return cls(
                DecoderKind.PER_TOKEN,
                lambda token: decoder.decode(["a", token])[1:],
                lambda token: decoder.decode([token]),
            )
        return _byte_fallback_scheme(steps) or cls(
            DecoderKind.OTHER,
            lambda token: decoder.decode([token]),
            lambda token: decoder.decode([token]),
        )


class ByteLevelPiece:
    """GPT-2's byte-level alphabet: in vocabularies, a printable character stands for every byte."""

    __slots__ = ("_byte_of",)

    def __init__(self) -> None:
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._byte_of = {chr(byte): byte for byte in printable}
        self._byte_of |= {chr(256 + n): byte for n, byte in enumerate(others)}

    def __call__(self, token: str) -> Piece:
        """A token with any character outside the alphabet (an added one) stands for itself."""
        try:
            data = bytes(map(self._byte_of.__getitem__, token))
        except KeyError:
            return token
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data


def _byte_fallback_scheme(steps: list[dict[str, Any]]) -> DecoderScheme | None:
    """SentencePiece's decoder as conversions write it: Replace… ByteFallback? Fuse? Strip?, in this order."""
    remaining = list(steps)

    def take(kind: str) -> dict[str, Any] | None:
        return remaining.pop(0) if remaining and remaining[0]["type"] == kind else None

    replacements: list[tuple[str, str]] = []
    while (replace := take("Replace")) is not None:
        pattern = replace["pattern"].get("String")
        if not pattern:
            return None
        replacements.append((pattern, replace["content"]))
    has_bytes = take("ByteFallback") is not None
    # Strip works on the whole text only where Fuse has made one of it.
    strip = take("Strip") if take("Fuse") is not None else None
    if remaining or (strip is not None and strip["stop"]):
        return None

    def to_piece(token: str) -> Piece:
        for old, new in replacements:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        return token if byte is None else bytes([int(byte[1], 16)])

    return DecoderScheme(
        DecoderKind.BYTE_FALLBACK,
        to_piece,
        to_piece,
        strip_content=strip["content"] if strip else "",
        strip_count=strip["start"] if strip else 0,
    )


class PieceTable(dict[int, Piece | None]):
    """Token id → piece, computed on first use: a vocabulary has up to 260,000, a server meets few.

    None for a token that adds nothing and interrupts nothing: one of `skipped_ids`, or an id without a token
    (models pad their vocabulary).
    """

    def __init__(
        self,
        id_to_token: Callable[[int], str | None],
        to_piece: Callable[[str], Piece],
        skipped_ids: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self._id_to_token = id_to_token
        self._to_piece = to_piece
        self._skipped_ids = skipped_ids

    def __missing__(self, token_id: int) -> Piece | None:
        token = None if token_id in self._skipped_ids else self._id_to_token(token_id)
        piece = self[token_id] = None if token is None else self._to_piece(token)
        return piece
