"""Incremental detokenising gives what decoding everything at once gives, for any ids."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mlxd.text.detokenizer import REPLACEMENT, Detokenizer
from mlxd.text.token_pieces import DecoderKind, DecoderScheme
from mlxd.text.tokenizer import Tokenizer
from tests.unit.text import small_tokenizers

EXACT = {
    "byte level": small_tokenizers.byte_level(),
    "byte fallback, strip": small_tokenizers.byte_fallback(),
    "byte fallback, strip 3": small_tokenizers.byte_fallback(strip=3),
    "byte fallback, no strip": small_tokenizers.byte_fallback(strip=0),
    "metaspace": small_tokenizers.metaspace(),
    "word piece": small_tokenizers.word_piece(),
    "words": small_tokenizers.words_only(),
}
TOKENIZERS = {name: Tokenizer(tokenizer) for name, tokenizer in EXACT.items()}
WINDOW = Tokenizer(small_tokenizers.unknown_decoder())

UTF8 = "aé日🙂\ufffd".encode() + b"\x80\xff\xc3\xe6\x97\xf0\x9f\x99"
"""Bytes that begin, continue, complete and break characters."""


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of all kinds: bytes, words, special tokens, ids without a token; and the ids of real text."""
    anything = st.integers(0, tokenizer.vocab_size + 3)
    spellings = [small_tokenizers.BYTE_TOKENS[byte] for byte in UTF8] + [
        "▁",
        "▁▁",
        "▁T",
        "▁Ġ",
        "<s>",
        "<tool call>",
    ]
    bytes_ = [
        i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in {bytes([b]) for b in UTF8}
    ]
    known = [i for spelling in spellings if (i := tokenizer.token_to_id(spelling)) is not None]
    mixed = st.lists(st.one_of(anything, st.sampled_from(known + bytes_)), max_size=30)
    text = st.text("the Té日🙂\n1", max_size=20).map(lambda text: tokenizer.encode(text))
    return st.one_of(mixed, text)


IDS = {name: token_ids(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def pieces(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join([*map(detokenizer.add, ids), detokenizer.finish()])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_full_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(IDS[name])
    skip = data.draw(st.booleans())
    assert pieces(tokenizer.detokenizer(skip), ids) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_with_a_prompt_the_pieces_continue_its_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, ids = data.draw(IDS[name]), data.draw(token_ids(tokenizer))
    skip = data.draw(st.booleans())
    text = pieces(tokenizer.detokenizer(skip, prompt), ids)
    whole = tokenizer.decode(prompt + ids, skip)
    assert whole.endswith(text)
    # What the prompt keeps is all of its text, but for characters that it left incomplete.
    kept, prompt_text = whole[: len(whole) - len(text)], tokenizer.decode(prompt, skip)
    assert prompt_text.startswith(kept)
    if not tokenizer.detokenizer(skip, prompt).finish():
        assert kept == prompt_text


@settings(max_examples=100, deadline=None)
@given(text=st.text("the Té日🙂\n1", max_size=30), prompt=st.text("a é日", max_size=10), skip=st.booleans())
def test_an_unknown_decoder_is_asked_and_real_text_comes_out_whole(
    text: str, prompt: str, skip: bool
) -> None:
    ids, prompt_ids = WINDOW.encode(text), WINDOW.encode(prompt)
    assert pieces(WINDOW.detokenizer(skip), ids) == text
    assert pieces(WINDOW.detokenizer(skip, prompt_ids), ids) == text


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_character_is_never_shown_in_part(data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[data.draw(st.sampled_from(["byte level", "byte fallback, strip"]))]
    text = data.draw(st.text("the Té日🙂\n", max_size=20))
    detokenizer = tokenizer.detokenizer(True)
    assert REPLACEMENT not in "".join(map(detokenizer.add, tokenizer.encode(text)))


def test_every_kind_of_decoder_is_covered() -> None:
    kinds = {DecoderScheme.of(tokenizer).kind for tokenizer in EXACT.values()}
    assert kinds == set(DecoderKind) - {DecoderKind.OTHER}
    assert DecoderScheme.of(small_tokenizers.unknown_decoder()).kind is DecoderKind.OTHER
