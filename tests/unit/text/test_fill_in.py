"""Fill-in-the-middle prompts of every family, over tokenisers of the kinds that these families use."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from mlxd.text.fill_in import FAMILIES, FillIn
from mlxd.text.tokenizer import Tokenizer
from tests.unit.text.small_tokenizers import byte_fallback, byte_level

NAMES = ["qwen", "starcoder", "santacoder", "deepseek", "codellama", "seed", "codestral"]
EXPECTED = {
    "qwen": "<|fim_prefix|>the cat<|fim_suffix|> sat<|fim_middle|>",
    "starcoder": "<fim_prefix>the cat<fim_suffix> sat<fim_middle>",
    "santacoder": "<fim-prefix>the cat<fim-suffix> sat<fim-middle>",
    "deepseek": "<｜fim▁begin｜>the cat<｜fim▁hole｜> sat<｜fim▁end｜>",
    "codellama": "▁<PRE>the cat▁<SUF> sat▁<MID>",
    "seed": "<[fim-suffix]> sat<[fim-prefix]>the cat<[fim-middle]>",
    "codestral": "[SUFFIX] sat[PREFIX]the cat",
}


def tokenizer_with(*tokens: str, sentencepiece: bool = False, bos: bool = False) -> Tokenizer:
    inner = byte_fallback(bos=bos) if sentencepiece else byte_level(bos=bos)
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    return Tokenizer(inner, bos_token="<s>", eos_token="</s>")


def family_tokens(name: str) -> list[str]:
    family = FAMILIES[NAMES.index(name)]
    return [token for token in (family.prefix, family.suffix, family.middle) if token]


def texts(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return "".join(tokenizer.token_text(token_id) for token_id in token_ids)


@pytest.mark.parametrize("name", NAMES)
def test_each_familys_order(name: str) -> None:
    tokenizer = tokenizer_with(*family_tokens(name))
    fill_in = FillIn.of(tokenizer)
    assert fill_in is not None
    token_ids = fill_in.encode("the cat", " sat", add_special_tokens=True)
    assert texts(tokenizer, token_ids) == EXPECTED[name]
    for token in family_tokens(name):
        assert token_ids.count(tokenizer.token_to_id(token)) == 1


def test_every_family_has_a_case() -> None:
    assert len(NAMES) == len(FAMILIES)


@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_bos_comes_first_where_the_model_wants_it(add_special_tokens: bool) -> None:
    tokenizer = tokenizer_with(*family_tokens("codellama"), bos=True)
    fill_in = FillIn.of(tokenizer)
    assert fill_in is not None
    token_ids = fill_in.encode("a", "b", add_special_tokens=add_special_tokens)
    assert (token_ids[0] == tokenizer.bos_token_id) is add_special_tokens


@pytest.mark.parametrize("name", ["codellama", "codestral"])
def test_sentencepiece_puts_no_space_before_the_suffix(name: str) -> None:
    """As mistral-common's own test has it: `[SUFFIX]return▁a▁+▁b[PREFIX]▁def▁f(`."""
    tokenizer = tokenizer_with(*family_tokens(name), sentencepiece=True)
    fill_in = FillIn.of(tokenizer)
    assert fill_in is not None
    for suffix in ("sat the", " sat", "", "é."):
        token_ids = fill_in.encode("the", suffix, add_special_tokens=False)
        prefix_id, suffix_id = (tokenizer.token_to_id(token) for token in family_tokens(name)[:2])
        start = token_ids.index(suffix_id) + 1
        rest = token_ids[start:]
        ends = {prefix_id, *(tokenizer.token_to_id(token) for token in family_tokens(name)[2:])}
        stops = [place for place, token in enumerate(rest) if token in ends]
        inner = rest[: stops[0]] if stops else rest
        data = b"".join(tokenizer.token_bytes(token_id) for token_id in inner)
        assert data.decode() == suffix
        assert tokenizer.token_text(token_ids[token_ids.index(prefix_id) + 1]) == " the"


def test_a_vocabulary_without_such_tokens_has_none() -> None:
    assert FillIn.of(tokenizer_with()) is None
    assert FillIn.of(tokenizer_with("<|fim_prefix|>", "<|fim_suffix|>")) is None


def test_what_ends_the_middle() -> None:
    tokenizer = tokenizer_with(*family_tokens("qwen"), "<|endoftext|>", "<|file_sep|>")
    fill_in = FillIn.of(tokenizer)
    assert fill_in is not None
    ends = [tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|file_sep|>")]
    assert list(fill_in.end_token_ids) == ends
