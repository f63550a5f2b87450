"""Log-probabilities in OpenAI's two shapes: chat's list of tokens, and the older parallel lists.

It does not know frames or requests. A token that ends the text gives no text, so, as at OpenAI, it has no
entry: the tokens joined are the text (before stop strings are cut off).
"""

from __future__ import annotations

import codecs
from typing import Any

from mlxd.engine.request import FinishReason, RequestOutput
from mlxd.step import TokenLogprobs
from mlxd.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""What JSON gets for minus infinity, as in vLLM and OpenAI's own answers."""

_MISSING = TokenLogprobs(MIN_LOGPROB, 0)


def shown_logprobs(output: RequestOutput) -> list[tuple[int, TokenLogprobs]]:
    """(token id, log-probabilities) of the tokens that are part of the text."""
    pairs = [
        (token_id, entry or _MISSING)
        for token_id, entry in zip(output.token_ids, output.logprobs or (), strict=False)
    ]
    if output.finish_reason is FinishReason.STOP and not isinstance(output.stop_reason, str):
        pairs = pairs[:-1]
    return pairs


def mean_logprob(output: RequestOutput) -> float:
    """Log-probability a token, by which best_of chooses."""
    entries = [max((entry or _MISSING).logprob, MIN_LOGPROB) for entry in output.logprobs or ()]
    return sum(entries) / len(entries) if entries else MIN_LOGPROB


def chat_logprobs(output: RequestOutput, tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`"""
    return {
        "content": [
            {
                **_token(token_id, entry.logprob, tokenizer),
                "top_logprobs": [
                    _token(top_id, logprob, tokenizer)
                    for top_id, logprob in zip(
                        entry.top_token_ids[:num_top], entry.top_logprobs[:num_top], strict=True
                    )
                ],
            }
            for token_id, entry in shown_logprobs(output)
        ],
        "refusal": None,
    }


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """The older shape, made piece by piece: `text_offset` counts characters from the start of the text."""

    __slots__ = ("_decoder", "_num_top", "_offset", "_skip_special_tokens", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, num_top: int, *, skip_special_tokens: bool, offset: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._skip_special_tokens = skip_special_tokens
        self._offset = offset
        # A character may be spread over tokens: it counts once its last byte is there.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, output: RequestOutput) -> dict[str, Any]:
        """`{tokens, token_logprobs, top_logprobs, text_offset}` of what is new.

        The sampled token is always among its top_logprobs, which so may have one more than asked for.
        """
        tokens: list[str] = []
        token_logprobs: list[float] = []
        top_logprobs: list[dict[str, float]] = []
        text_offset: list[int] = []
        for token_id, entry in shown_logprobs(output):
            text = self._tokenizer.token_text(token_id)
            logprob = max(entry.logprob, MIN_LOGPROB)
            tokens.append(text)
            token_logprobs.append(logprob)
            top = zip(entry.top_token_ids[: self._num_top], entry.top_logprobs[: self._num_top], strict=True)
            alternatives = {self._tokenizer.token_text(i): max(value, MIN_LOGPROB) for i, value in top}
            alternatives.setdefault(text, logprob)
            top_logprobs.append(alternatives)
            text_offset.append(self._offset)
            if not (self._skip_special_tokens and token_id in self._tokenizer.special_token_ids):
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs if self._num_top else None,
            "text_offset": text_offset,
        }
