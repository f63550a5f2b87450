"""Log-probabilities in OpenAI's two shapes, chat's list of tokens and the older parallel lists, and vLLM's.

It does not know frames or requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlxd.engine.prompt_logprobs import PromptLogprobs
from mlxd.engine.request import FinishReason, RequestOutput
from mlxd.errors import InvalidRequestError
from mlxd.step import TokenLogprobs
from mlxd.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""What JSON gets for minus infinity, as in vLLM and OpenAI's own answers."""

_MISSING = TokenLogprobs(MIN_LOGPROB, 0)


def check_prompt_logprobs(
    prompts: Sequence[Sequence[int]], asked: dict[str, int | None], num_choices: int, limit: int
) -> int:
    """How many alternatives the prompts' tokens need: the most that a field of `asked` wants; -1 for none.

    Raises:
        InvalidRequestError: the answer would hold more than `limit` log-probabilities of prompt tokens.
    """
    wanted = {name: count for name, count in asked.items() if count is not None}
    num_tokens = num_choices * sum(map(len, prompts))
    for name, count in wanted.items():
        if num_tokens * (1 + count) > limit:
            raise InvalidRequestError(
                f"{name}: {num_tokens} prompt tokens with {1 + count} log-probabilities each are more than "
                f"the {limit} that an answer may hold",
                param=name,
            )
    return max(wanted.values(), default=-1)


def mean_logprob(output: RequestOutput) -> float:
    """Log-probability a token, by which best_of chooses."""
    entries = [max((entry or _MISSING).logprob, MIN_LOGPROB) for entry in output.logprobs or ()]
    return sum(entries) / len(entries) if entries else MIN_LOGPROB


def chat_logprobs(output: RequestOutput, tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`

    A token that ends the text gives no text, so, as at OpenAI, it has no entry: the tokens joined are the
    text (before stop strings are cut off).
    """
    pairs = _pairs(output)
    if output.finish_reason is FinishReason.STOP and not isinstance(output.stop_reason, str):
        pairs = pairs[:-1]
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
            for token_id, entry in pairs
        ],
        "refusal": None,
    }


def _pairs(output: RequestOutput) -> list[tuple[int, TokenLogprobs]]:
    """(token id, log-probabilities) of the tokens that came."""
    return [
        (token_id, entry or _MISSING)
        for token_id, entry in zip(output.token_ids, output.logprobs or (), strict=False)
    ]


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def vllm_prompt_logprobs(
    token_ids: Sequence[int], known: PromptLogprobs, num_top: int, tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """`[null, {"<token id>": {logprob, rank, decoded_token}, …}, …]`: each prompt token, its alternatives."""
    entries: list[dict[str, Any] | None] = [None]
    for token_id, entry in zip(token_ids[1:], known, strict=True):
        ranked = {token_id: (entry.logprob, entry.rank)}
        top = zip(entry.top_token_ids[:num_top], entry.top_logprobs[:num_top], strict=True)
        for rank, (top_id, logprob) in enumerate(top, 1):
            ranked.setdefault(top_id, (logprob, rank))
        entries.append(
            {
                str(key): {
                    "logprob": max(logprob, MIN_LOGPROB),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(key),
                }
                for key, (logprob, rank) in ranked.items()
            }
        )
    return entries


class CompletionLogprobs:
    """The older shape, made piece by piece: `text_offset` counts characters from the start of the text.

    Every token has an entry, also one that ends the text and gives none, as in vLLM: lm-eval takes the last
    one for the generated token, whatever it is.
    """

    __slots__ = ("_detokenizer", "_num_top", "_offset", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_top: int,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0
        # A character may be spread over tokens: it counts once its last byte is there.
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens, prompt_token_ids)

    def echo(self, text: str, token_ids: Sequence[int], known: PromptLogprobs) -> dict[str, Any]:
        """Those of the prompt, whose text is `text`: to be called first, where it is repeated.

        Nothing predicts its first token, whose entries are null.
        """
        detokenizer = self._tokenizer.detokenizer(skip_special_tokens=True)
        special = self._tokenizer.special_token_ids
        offsets: list[int] = []
        for token_id in token_ids:
            offsets.append(min(self._offset, len(text)))
            shown = detokenizer.add(token_id)
            if token_id in special:
                # Part of the text if the client has written it; not so what the tokeniser puts in front.
                shown = self._tokenizer.token_text(token_id)
                shown = shown if text.startswith(shown, self._offset) else ""
            self._offset += len(shown)
        self._offset = len(text)
        rest = self._lists(zip(token_ids[1:], known, strict=True))
        first = self._tokenizer.token_text(token_ids[0])
        return {
            "tokens": [first, *rest["tokens"]],
            "token_logprobs": [None, *rest["token_logprobs"]],
            "top_logprobs": [None, *rest["top_logprobs"]] if self._num_top else None,
            "text_offset": offsets,
        }

    def add(self, output: RequestOutput) -> dict[str, Any]:
        """`{tokens, token_logprobs, top_logprobs, text_offset}` of what is new.

        The sampled token is always among its top_logprobs, which so may have one more than asked for.
        """
        pairs = _pairs(output)
        offsets: list[int] = []
        for token_id, _ in pairs:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.add(token_id))
        lists = self._lists(pairs)
        return {
            "tokens": lists["tokens"],
            "token_logprobs": lists["token_logprobs"],
            "top_logprobs": lists["top_logprobs"] if self._num_top else None,
            "text_offset": offsets,
        }

    def _lists(self, pairs: Iterable[tuple[int, TokenLogprobs]]) -> dict[str, list[Any]]:
        to_text = self._tokenizer.token_text
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for token_id, entry in pairs:
            text = to_text(token_id)
            logprob = max(entry.logprob, MIN_LOGPROB)
            lists["tokens"].append(text)
            lists["token_logprobs"].append(logprob)
            if self._num_top:
                alternatives: dict[str, float] = {}
                top = zip(
                    entry.top_token_ids[: self._num_top], entry.top_logprobs[: self._num_top], strict=True
                )
                # Of several tokens with one text (parts of characters), the likeliest stands for it.
                for top_id, value in top:
                    alternatives.setdefault(to_text(top_id), max(value, MIN_LOGPROB))
                alternatives.setdefault(text, logprob)
                lists["top_logprobs"].append(alternatives)
        return lists


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two pieces of the older shape as one."""
    return {
        name: None if first[name] is None else first[name] + second[name]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
