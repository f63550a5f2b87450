"""Walks through grammars at random, as a model would that knows nothing: what comes out is all that is known.

It does not know what the grammars say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from tokenizers import decoders, models, pre_tokenizers

END = "<end>"
_WORDS = ('{"', '":', '", "', "the", "an", "10", "00", "true", "null", "]}", "\n\n", "  ", "日")


class Walker:
    """Every byte is a token, some words are, and so are the special tokens that are given."""

    def __init__(
        self, folder: str, special_tokens: Sequence[str] = (), added_tokens: Sequence[str] = ()
    ) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens([*_WORDS, *added_tokens])
        tokenizer.add_special_tokens([END, *special_tokens])
        path = f"{folder}/tokenizer.json"
        tokenizer.save(path)
        self.tokenizer = tokenizer
        self.special_tokens = {text: tokenizer.token_to_id(text) for text in special_tokens}
        self._end = tokenizer.token_to_id(END)
        self._tokenizer = LLTokenizer(path, n_vocab=tokenizer.get_vocab_size(), eos_token=self._end)

    def walk(self, grammar: str, source: random.Random, *, max_tokens: int = 600) -> str | None:
        """A text of the grammar; None if it has not come to its end by then.

        Where it may end, it does so now and then.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits).tolist()
            assert not matcher.is_error(), matcher.get_error()
            if self._end in allowed and (len(allowed) == 1 or source.random() < 0.3):
                return self._tokenizer.decode_bytes(tokens).decode()
            token = source.choice([token for token in allowed if token != self._end])
            assert matcher.consume_token(token)
            tokens.append(token)
        return None

    def matches(self, grammar: str, text: str) -> bool:
        """Whether the grammar has that text."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        return matcher.consume_tokens(self._tokenizer.tokenize_str(text)) and matcher.is_accepting()
