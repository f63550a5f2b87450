"""Prompts that ask a code model for what is missing between two texts: fill-in-the-middle.

It does not know requests. Which way a model was trained is told by the tokens that its vocabulary has.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxd.text.tokenizer import Tokenizer

ANCHOR = "☺"
"""Put before a text that does not begin a word of its own, and taken away again, as mistral-common and
CodeLlama's own code do: SentencePiece tokenisers put a space before what they are given."""


@dataclass(frozen=True, slots=True)
class FillInTokens:
    """A family's tokens as its vocabulary spells them. `ends` are those with which it ends what it filled in,
    besides its end of turn."""

    prefix: str
    suffix: str
    middle: str | None = None
    suffix_first: bool = False
    ends: tuple[str, ...] = ()


FAMILIES = (
    # Qwen2.5-Coder and later Qwens, CodeGemma, Granite 3 and 4
    FillInTokens(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ends=("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder, Granite Code, StableCode, Yi-Coder
    FillInTokens(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ends=("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>"),
    ),
    # SantaCoder
    FillInTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>", "<fim-pad>")),
    # DeepSeek-Coder
    FillInTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    # CodeLlama
    FillInTokens("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
    # Seed-Coder
    FillInTokens("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),
    # Codestral
    FillInTokens("[PREFIX]", "[SUFFIX]", suffix_first=True),
)


class FillIn:
    """How one tokeniser writes such prompts. `end_token_ids` end what is filled in."""

    __slots__ = ("_family", "_tokenizer", "end_token_ids")

    def __init__(self, tokenizer: Tokenizer, family: FillInTokens) -> None:
        self._tokenizer = tokenizer
        self._family = family
        ends = (tokenizer.token_to_id(token) for token in family.ends)
        self.end_token_ids = tuple(token_id for token_id in ends if token_id is not None)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> FillIn | None:
        """None where the vocabulary has no such tokens."""
        for family in FAMILIES:
            needed = (family.prefix, family.suffix, *([family.middle] if family.middle else []))
            if all(tokenizer.token_to_id(token) is not None for token in needed):
                return cls(tokenizer, family)
        return None

    def encode(self, prefix: str, suffix: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the prompt that asks for what stands between `prefix` and `suffix`.

        `add_special_tokens` puts BOS in front, where the model has it there. Raises InvalidRequestError for
        text that is not Unicode.
        """
        tokenizer, family = self._tokenizer, self._family
        before = [self._id(family.prefix), *tokenizer.encode(prefix, add_special_tokens=False)]
        after = [self._id(family.suffix), *self._encode_inner(suffix)]
        parts = after + before if family.suffix_first else before + after
        middle = [] if family.middle is None else [self._id(family.middle)]
        bos = tokenizer.bos_token_id
        has_bos = add_special_tokens and bos is not None and tokenizer.encode("")[:1] == [bos]
        return [*([bos] if has_bos and bos is not None else []), *parts, *middle]

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        assert token_id is not None
        return token_id

    def _encode_inner(self, text: str) -> list[int]:
        """`text` without the space that some tokenisers put before it."""
        tokenizer = self._tokenizer
        plain = tokenizer.encode(text, add_special_tokens=False)
        word = tokenizer.encode("a", add_special_tokens=False)
        if not word or not tokenizer.token_text(word[0]).startswith(" "):
            return plain
        anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
        anchored = tokenizer.encode(ANCHOR + text, add_special_tokens=False)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else plain
