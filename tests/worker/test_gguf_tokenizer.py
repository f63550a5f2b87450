"""Tokenizers from GGUF metadata: they must encode as their originals do, and decode back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mlxd.errors import ConfigError
from mlxd.worker.gguf_tokenizer import score_merges, tokenizer_files
from tests.worker.test_gguf import ALPHABET


@dataclass
class Values:
    """Metadata given as plain Python values."""

    values: dict[str, object] = field(default_factory=dict)

    def get(self, key: str) -> object:
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        assert isinstance(value, int)
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def strings(self, key: str) -> list[str]:
        value = self.values.get(key, [])
        assert isinstance(value, list)
        return value

    def numbers(self, key: str) -> list[float]:
        value = self.values.get(key, [])
        assert isinstance(value, list)
        return value


def build(values: dict[str, object]) -> Tokenizer:
    files = tokenizer_files(Values({"{arch}.context_length": 64} | values))
    return Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


BYTE_TOKENS = ["<s>", "<end>", *ALPHABET, "12", "123", "1234", "Ġ1"]


def byte_level(pre: str, **more: object) -> Tokenizer:
    merges = ["1 2", "12 3", "123 4", "Ġ 1"]
    return build(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": BYTE_TOKENS,
            "tokenizer.ggml.token_type": [3, 3, *[1] * (len(BYTE_TOKENS) - 2)],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0,
        }
        | more
    )


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["1234", "<end>", "Ġ", "12"]),
        ("smollm", ["1", "2", "3", "4", "<end>", "Ġ", "1", "2"]),
        ("qwen2", ["1", "2", "3", "4", "<end>", "Ġ", "1", "2"]),
        ("llama-bpe", ["<s>", "123", "4", "<end>", "Ġ", "12"]),
    ],
)
def test_digits_are_cut_as_the_pre_tokenizer_says(pre: str, tokens: list[str]) -> None:
    assert byte_level(pre).encode("1234<end> 12").tokens == tokens


def test_a_beginning_token_where_the_file_says_so() -> None:
    adding = byte_level("smollm", **{"tokenizer.ggml.add_bos_token": True})
    assert adding.encode("a").tokens == ["<s>", "a"]
    assert adding.encode("a", add_special_tokens=False).tokens == ["a"]


@given(st.text())
def test_byte_level_gives_every_text_back(text: str) -> None:
    for pre in ("smollm", "gpt-2", "llama-bpe"):
        tokenizer = byte_level(pre)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


PIECES = {"▁": -10.0, "a": -11.0, "b": -12.0, "c": -13.0, "ab": -1.0, "bc": -2.0, "▁a": -3.0, "abc": -4.0}
SPM_TOKENS = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *PIECES]


def sentencepiece(**more: object) -> Tokenizer:
    return build(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": SPM_TOKENS,
            "tokenizer.ggml.scores": [0.0] * 259 + list(PIECES.values()),
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 0,
        }
        | more
    )


def joined_by_score(text: str) -> list[str]:
    """SentencePiece's rule, naively: join the neighbours whose piece has the best score, leftmost first."""
    pieces = list(text)
    while True:
        best = max(
            (
                (PIECES[pieces[i] + pieces[i + 1]], -i)
                for i in range(len(pieces) - 1)
                if pieces[i] + pieces[i + 1] in PIECES
            ),
            default=None,
        )
        if best is None:
            return pieces
        at = -best[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@given(st.text(alphabet="abc ", min_size=1))
def test_sentencepiece_joins_by_score(text: str) -> None:
    expected = joined_by_score(("▁" + text).replace(" ", "▁"))
    tokenizer = sentencepiece()
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["<s>", *expected]
    assert tokenizer.decode(encoded.ids) == text


def test_sentencepiece_falls_back_to_bytes() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode("ab é", add_special_tokens=False).ids
    assert [SPM_TOKENS[i] for i in ids][-2:] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "ab é"


def test_merges_come_in_the_order_of_their_scores() -> None:
    merges = score_merges(list(PIECES), list(PIECES.values()))
    assert merges[0] == ("a", "b")
    assert [left + right for left, right in merges] == ["ab", "bc", "▁a", "abc", "abc"]


def test_a_vocabulary_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'rwkv'"):
        build({"tokenizer.ggml.model": "rwkv"})
