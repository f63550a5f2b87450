"""The tokeniser: text to token ids and back, over the `tokenizers` library.

It does not know requests, chat templates or transformers; a folder without tokenizer.json is converted by
another process (convert.py).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import tokenizers

from mlxd.errors import ConfigError, InvalidRequestError
from mlxd.text.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    Detokenizer,
    PerTokenDetokenizer,
    WindowDetokenizer,
)
from mlxd.text.model_files import ModelFiles
from mlxd.text.token_pieces import DecoderKind, DecoderScheme, PieceTable

CONVERT_TIMEOUT_SECONDS = 300

_NOT_UNICODE = "the text is not valid Unicode: it holds a lone surrogate"


class EncodedPair(NamedTuple):
    """Two texts in one sequence. The last `num_trailing` tokens are special ones, after the second text's
    `num_second`."""

    token_ids: list[int]
    token_types: list[int]
    num_second: int
    num_trailing: int

    @classmethod
    def of(cls, encoding: tokenizers.Encoding) -> EncodedPair:
        owners = encoding.sequence_ids
        trailing = next((n for n, owner in enumerate(reversed(owners)) if owner is not None), len(owners))
        return cls(encoding.ids, encoding.type_ids, owners.count(1), trailing)


class Tokenizer:
    """Immutable after loading, and safe to use from several threads: encoding and decoding release the GIL.

    `bos_token`, `eos_token` (and their ids) are None where the model has none. `vocab_size` is one more than
    the largest id that has a token. `special_token_ids` are those that `skip_special_tokens` leaves out;
    `control_token_ids` are these and all others added in the shape of a tag, such as Qwen's `<tool_call>`,
    which llguidance does not take for text either.
    """

    __slots__ = (
        "_pieces",
        "_scheme",
        "_tokenizer",
        "_visible_first_pieces",
        "_visible_pieces",
        "bos_token",
        "bos_token_id",
        "control_token_ids",
        "eos_token",
        "eos_token_id",
        "special_token_ids",
        "vocab_size",
    )

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        # Length limits in tokenizer.json come from training; a server counts, and refuses what is too long.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.control_token_ids = self.special_token_ids.union(
            token_id for token_id, token in added.items() if _is_tag(token.content)
        )
        self.vocab_size = max(tokenizer.get_vocab_size(), max(added, default=-1) + 1)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_token_id = None if bos_token is None else tokenizer.token_to_id(bos_token)
        self.eos_token_id = None if eos_token is None else tokenizer.token_to_id(eos_token)
        self._scheme = DecoderScheme.of(tokenizer)
        to_token = tokenizer.id_to_token
        self._pieces = PieceTable(to_token, self._scheme.to_piece)
        self._visible_pieces = PieceTable(to_token, self._scheme.to_piece, self.special_token_ids)
        self._visible_first_pieces = PieceTable(to_token, self._scheme.to_first_piece, self.special_token_ids)

    @classmethod
    def load(cls, files: ModelFiles, *, trust_remote_code: bool = False) -> Tokenizer:
        """Reads tokenizer.json, or converts what else the folder has.

        `trust_remote_code` lets the conversion run tokeniser code that the folder brings. Raises ConfigError
        where there is no tokeniser, or none that can be read.
        """
        path = files.path / "tokenizer.json"
        try:
            if path.is_file():
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
            else:
                tokenizer = tokenizers.Tokenizer.from_str(_convert(files, trust_remote_code))
        except ConfigError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ConfigError(f"{path}: not a tokeniser: {error}") from error
        special_tokens = files.special_tokens
        return cls(
            tokenizer, bos_token=special_tokens.get("bos_token"), eos_token=special_tokens.get("eos_token")
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it count as such.

        `add_special_tokens` adds what the model's post-processor says (usually BOS in front). Raises
        InvalidRequestError for text that is not Unicode (a lone surrogate).
        """
        [ids] = self.encode_batch([text], add_special_tokens)
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, on all cores; the GIL is free meanwhile."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidRequestError(_NOT_UNICODE) from error
        return [encoding.ids for encoding in encodings]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """Each pair of texts as one sequence, as the model's post-processor joins them, on all cores."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(pairs), add_special_tokens=True)
        except TypeError as error:
            raise InvalidRequestError(_NOT_UNICODE) from error
        return [EncodedPair.of(encoding) for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids without a token count as none. InvalidRequestError below 0.

        No clean-up of spaces before punctuation, which some old configurations ask for: it spoils code.
        """
        try:
            # As a batch, because for a single text `tokenizers` keeps the GIL.
            [text] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
            return text
        except OverflowError as error:
            raise InvalidRequestError("a token id is out of range") from error

    def detokenizer(self, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """A detokeniser for one sequence. With a prompt, its text continues the prompt's.

        That matters for the space at the beginning (SentencePiece drops it from a text's first word only) and
        for a prompt that ends inside a character.
        """
        scheme = self._scheme
        pieces = self._visible_pieces if skip_special_tokens else self._pieces
        if scheme.kind is DecoderKind.BYTE_LEVEL:
            return ByteLevelDetokenizer(pieces, prompt_token_ids)
        if scheme.kind is DecoderKind.BYTE_FALLBACK:
            return ByteFallbackDetokenizer(pieces, prompt_token_ids, scheme.strip_content, scheme.strip_count)
        if scheme.kind is DecoderKind.PER_TOKEN:
            if skip_special_tokens:
                first_pieces = self._visible_first_pieces
            else:
                first_pieces = PieceTable(self._tokenizer.id_to_token, scheme.to_first_piece)
            return PerTokenDetokenizer(pieces, first_pieces, prompt_token_ids)
        return WindowDetokenizer(
            lambda ids: self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens), prompt_token_ids
        )

    def token_text(self, token_id: int) -> str:
        """A token's text inside a sequence, with U+FFFD for bytes that are no character by themselves.

        "" for an id without a token. Special tokens are shown.
        """
        piece = self._pieces[token_id]
        return piece if isinstance(piece, str) else (piece or b"").decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds inside a sequence; b"" for an id without a token."""
        piece = self._pieces[token_id]
        return piece.encode() if isinstance(piece, str) else (piece or b"")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None where there is none."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id


def _convert(files: ModelFiles, trust_remote_code: bool) -> str:
    """tokenizer.json's text, made of other tokeniser files by a process that may import transformers.

    That import costs 125 MB and seconds, which the front process must not keep.
    """
    command = [sys.executable, "-m", "mlxd.text.convert", str(files.path)]
    if trust_remote_code:
        command.append("--trust-remote-code")
    try:
        done = subprocess.run(command, capture_output=True, timeout=CONVERT_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{files.path}: the tokeniser's conversion took too long") from error
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ConfigError(
            f"{files.path}: no tokenizer.json, and transformers cannot make one of the other files: {reason}"
        )
    return done.stdout.decode()


def _is_tag(text: str) -> bool:
    return text.startswith("<") and text.endswith(">")
