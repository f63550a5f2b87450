"""What the engine is asked for: defaults and limits that hold in every dialect.

It does not know a request's schema, messages, prompts' text or answers.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from mlxd.config import Config
from mlxd.engine.request import GenerationRequest
from mlxd.errors import InvalidRequestError
from mlxd.step import SamplingParams
from mlxd.text.model_files import ModelFiles

N = TypeVar("N", int, float)

_SEED_MASK = 2**63 - 1

WHOLE_ANSWER_INTERVAL = 64
"""Tokens an output of an answer that is not streamed: few wake-ups, and no long text appended to often."""


class SequencePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The sequences of a request. `num_sampled` of them are made of each prompt (`best_of`), and the best
    `num_choices` (`n`) answered."""

    common: GenerationRequest
    """what they are all asked for; each has its own id, prompt, index and seed"""
    num_choices: int = 1
    num_sampled: int = 1

    def with_common(self, **changes: Any) -> SequencePlan:
        """The same, with `changes` to what is common."""
        return msgspec.structs.replace(self, common=msgspec.structs.replace(self.common, **changes))

    def sequences(self, response_id: str, prompts: list[list[int]]) -> list[GenerationRequest]:
        """One request a sequence: `num_sampled` of the first prompt, then of the second, and so on."""
        common = self.common
        return [
            msgspec.structs.replace(
                common,
                request_id=f"{response_id}-{index}",
                prompt_token_ids=prompts[index // self.num_sampled],
                index=index,
                # Each sequence its own numbers, the same ones whenever the request is repeated.
                seed=None if common.seed is None else (common.seed + index) & _SEED_MASK,
                # The same for all sequences of a prompt: the first one asks.
                prompt_logprobs=common.prompt_logprobs if index % self.num_sampled == 0 else -1,
            )
            for index in range(len(prompts) * self.num_sampled)
        ]


def resolve_sampling(
    config: Config,
    files: ModelFiles,
    *,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> SamplingParams:
    """How to sample: the request > the server's default > the model's generation_config > 1.0, or off."""
    top_p = _first(top_p, config.defaults.top_p, files.default_top_p, 1.0)
    top_k = max(0, _first(top_k, files.default_top_k, 0))
    if top_p == 0:  # the smallest set of tokens that holds any probability: the likeliest one
        top_p, top_k = 1.0, 1
    return SamplingParams(
        temperature=_first(temperature, config.defaults.temperature, files.default_temperature, 1.0),
        top_k=top_k,
        top_p=top_p,
        min_p=_first(min_p, files.default_min_p, 0.0),
        repetition_penalty=_first(repetition_penalty, files.default_repetition_penalty, 1.0),
    )


def stop_strings(stop: str | list[str] | None, max_stop_strings: int, *, param: str) -> tuple[str, ...]:
    """The strings that end the answer.

    Raises:
        InvalidRequestError: too many, or an empty one; the error names `param`.
    """
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > max_stop_strings:
        raise InvalidRequestError(
            f"{param}: at most {max_stop_strings} strings, got {len(strings)}", param=param
        )
    if "" in strings:
        raise InvalidRequestError(f"{param}: an empty string would stop before the first token", param=param)
    return strings


def stream_interval(config: Config, stream: bool | None) -> int:
    """Tokens an output."""
    return config.defaults.stream_interval if stream else WHOLE_ANSWER_INTERVAL


def _first(*candidates: N | None) -> N:
    """The first that says something; the last always does."""
    for candidate in candidates:
        if candidate is not None:
            return candidate
    raise AssertionError("the last candidate is never None")
