"""The requests of OpenAI's chat and completions APIs, with vLLM's additional fields.

It does not know how they are honoured; ranges that depend on the configuration or the model are checked
elsewhere. Every optional field may be null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Temperature = Annotated[float, Meta(ge=0, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=10)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Meta(ge=0, le=2**31 - 1)]
NumLogprobs = Annotated[int, Meta(ge=0, le=20)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Seconds = Annotated[float, Meta(gt=0)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=1024)]
"""Requests share cached prefixes only with those of the same salt (vLLM's field)."""
ThinkingBudget = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
"""-1 is no limit, as in vLLM"""
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

ROLES = ("system", "developer", "user", "assistant", "tool")
Role = Annotated[str, Meta(extra_json_schema={"enum": ROLES})]
"""described as what is known; another one is refused by openai/messages.py, which can say whose it is"""


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: with include_usage, every chunk tells what its choice has used so far"""
    include_obfuscation: bool | None = None
    """informative: nothing here is encrypted, so there is nothing to pad"""


class GenerationFields(msgspec.Struct, kw_only=True):
    """What chat and completions have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """the newer name of max_tokens, which it wins over"""
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    n: Count | None = None
    best_of: Count | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: dict[str, Bias] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: CountOrZero | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    timeout: Seconds | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None

    # Informative: they change nothing in the answer.
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    prediction: Any = None

    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    """these six are checked by openai/structured.py"""

    echo: bool | None = None
    suffix: str | None = None
    """of chat, which has none, it is refused"""
    prompt_logprobs: NumLogprobs | None = None

    # Of a chat: what asks for something of a completion is refused.
    reasoning_effort: ReasoningEffort | None = None
    thinking_token_budget: ThinkingBudget | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    top_logprobs: NumLogprobs | None = None

    # vLLM's that mlxd has not. Who sends one expects another answer: what asks for something is refused.
    allowed_token_ids: Any = None
    bad_words: Any = None
    include_stop_str_in_output: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    """A call in the history; `arguments` is JSON text, or already an object as some clients send it."""

    function: FunctionCall
    id: str | None = None
    type: str | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatCompletionRequest(GenerationFields, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    """these two and `tools` are checked by chat/tools.py"""

    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None
    verbosity: Any = None
    chat_template: Any = None
    documents: Any = None


class CompletionRequest(GenerationFields, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[str | int | list[TokenId]]
    logprobs: NumLogprobs | None = None
    max_tokens: CountOrZero | None = None
    """0 to score a prompt without continuing it"""
