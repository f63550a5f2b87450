"""From a request's fields to the sequences the engine is asked for: limits, defaults, what is refused.

It does not know messages, prompts' text or answers.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mlxd.api.openai.schema import ChatCompletionRequest, GenerationFields
from mlxd.api.sequences import SequencePlan, resolve_sampling, stop_strings, stream_interval
from mlxd.config import Config
from mlxd.engine.request import GenerationRequest
from mlxd.errors import InvalidRequestError
from mlxd.text.model_files import ModelFiles

_EMPTY: tuple[Any, ...] = ("", [], {})
_REFUSED: dict[str, tuple[Any, ...]] = {
    "functions": _EMPTY,
    "function_call": _EMPTY,
    "audio": _EMPTY,
    "web_search_options": (),  # empty, it asks for a search
    "moderation": _EMPTY,
    "verbosity": ("medium",),
    "allowed_token_ids": _EMPTY,
    "bad_words": _EMPTY,
    "chat_template": _EMPTY,
    "documents": _EMPTY,
    "include_stop_str_in_output": (),
    "length_penalty": (1,),
    "logits_processors": _EMPTY,
    "return_token_ids": (),
    "return_tokens_as_token_ids": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
}
"""Fields that ask for what this server cannot do; values that ask for nothing, beside null and false."""
_REFUSED_IN_CHAT = _REFUSED | {"suffix": _EMPTY}
"""What only a prompt without a template can honour, too."""
_REFUSED_IN_COMPLETIONS = _REFUSED | {
    "reasoning_effort": _EMPTY,
    "thinking_token_budget": (),
    "enable_thinking": (),
    "chat_template_kwargs": _EMPTY,
    "tools": _EMPTY,
    "top_logprobs": (0,),
}
"""What only a chat has: a template, calls, and the alternatives beside `logprobs`, too."""


def refuse_unsupported(fields: GenerationFields) -> None:
    """Say no to known fields that cannot be honoured, rather than ignore them.

    Raises:
        InvalidRequestError: naming the field.
    """
    is_chat = isinstance(fields, ChatCompletionRequest)
    for name, harmless in (_REFUSED_IN_CHAT if is_chat else _REFUSED_IN_COMPLETIONS).items():
        value = getattr(fields, name, None)
        if value is not None and value is not False and value not in harmless:
            raise _unsupported(name)
    if isinstance(fields, ChatCompletionRequest) and fields.modalities and fields.modalities != ["text"]:
        raise _unsupported("modalities")
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options: only with stream: true", param="stream_options")


def _unsupported(name: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{name}: not supported by this server", param=name, code="unsupported_parameter"
    )


def plan_sequences(
    fields: GenerationFields,
    config: Config,
    files: ModelFiles,
    vocab_size: int,
    *,
    num_logprobs: int | None,
) -> SequencePlan:
    """Resolve the fields: request > server default > the model's generation_config > OpenAI's default.

    `num_logprobs`: how many alternatives, None for no logprobs.

    Raises:
        InvalidRequestError: naming the field that is out of range or contradicts another.
    """
    max_tokens = fields.max_completion_tokens or fields.max_tokens
    if max_tokens is None:
        max_tokens = config.defaults.max_tokens
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise _invalid("min_tokens", f"{min_tokens} is more than max_tokens {max_tokens}")
    # More than the queue takes when it is empty would be refused as overload, again and again.
    max_choices = min(config.limits.max_choices, config.scheduler.max_queue)
    num_choices, num_sampled = _choices(fields, max_choices)
    if num_sampled > num_choices and num_logprobs is None:
        num_logprobs = 0  # the best are those with the highest log-probability a token
    stop_token_ids = fields.stop_token_ids or []
    if any(token_id >= vocab_size for token_id in stop_token_ids):
        raise _invalid("stop_token_ids", f"token ids are below {vocab_size}")
    common = GenerationRequest(
        request_id="",
        prompt_token_ids=[],
        max_tokens=max_tokens,
        sampling=msgspec.structs.replace(
            resolve_sampling(
                config,
                files,
                temperature=fields.temperature,
                top_p=fields.top_p,
                top_k=fields.top_k,
                min_p=fields.min_p,
                repetition_penalty=fields.repetition_penalty,
            ),
            presence_penalty=fields.presence_penalty or 0.0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            logit_bias=_logit_bias(fields.logit_bias, vocab_size),
            min_tokens=min_tokens,
            logprobs=-1 if num_logprobs is None else num_logprobs,
        ),
        seed=fields.seed,
        stop=stop_strings(fields.stop, config.limits.max_stop_strings, param="stop"),
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=bool(fields.ignore_eos),
        skip_special_tokens=fields.skip_special_tokens is not False,
        priority=fields.priority or 0,
        cache_salt=fields.cache_salt or "",
        stream_interval=stream_interval(config, fields.stream),
        timeout_seconds=min(config.limits.timeout_seconds, fields.timeout or config.limits.timeout_seconds),
    )
    return SequencePlan(common=common, num_choices=num_choices, num_sampled=num_sampled)


def _choices(fields: GenerationFields, max_choices: int) -> tuple[int, int]:
    num_choices = fields.n or 1
    num_sampled = fields.best_of or num_choices
    if num_choices > max_choices:
        raise _invalid("n", f"at most {max_choices}, got {num_choices}")
    if num_sampled > max_choices:
        raise _invalid("best_of", f"at most {max_choices}, got {num_sampled}")
    if num_sampled < num_choices:
        raise _invalid("best_of", f"at least n, which is {num_choices}, got {num_sampled}")
    if num_sampled > num_choices and fields.stream:
        raise _invalid("best_of", "more than n cannot be streamed: which are best is known at the end")
    return num_choices, num_sampled


def _logit_bias(logit_bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in (logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise _invalid("logit_bias", f"the keys are token ids below {vocab_size}, got {key[:100]!r}")
        biases[int(key)] = bias
    return biases


def _invalid(param: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {problem}", param=param)
