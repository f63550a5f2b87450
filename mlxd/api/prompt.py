"""Conversations into prompts: through the model's chat template, then its tokenizer; and how to read answers.

It does not know dialects: messages, tools and tool_choice come in the shape that templates know, which is
OpenAI's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from mlxd.api.grammars import Constraint, constrain
from mlxd.api.sequences import SequencePlan
from mlxd.api.served_model import ServedModel
from mlxd.api.threads import MANY_MESSAGES, off_loop_if
from mlxd.chat.format import AnswerFormat, RenderedChat
from mlxd.chat.pipeline import OutputPipeline
from mlxd.chat.structured import StructuredOutput
from mlxd.chat.tools import ToolChoice, read_tool_choice, read_tools
from mlxd.chat.types import ToolSpec
from mlxd.engine.thinking import ThinkingParams
from mlxd.errors import InvalidRequestError
from mlxd.step import GrammarSpec

MAX_JOINED_TOKENS = 8
"""that a text ends with and that are others where it goes on"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a prompt was rendered from, for whoever renders it again with what came after."""

    messages: Sequence[dict[str, Any]]
    tools: tuple[ToolSpec, ...]
    tool_choice: ToolChoice
    kwargs: Mapping[str, Any]
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation, its tokens, where its messages begin, and how to read what answers it.

    `conversation` is None where the answer is not the next message, but more of the last one.
    """

    text: str
    token_ids: list[int]
    message_starts: tuple[int, ...]
    answer: AnswerFormat
    thinking: ThinkingParams | None
    constraint: Constraint | None = None
    conversation: Conversation | None = None
    num_opening_tokens: int = 0
    """before the first words of a user; 0 where no use is made of that"""

    def plan(self, plan: SequencePlan) -> SequencePlan:
        """`plan` with what the prompt and the answer's format ask of the engine."""
        common = plan.common
        grammar: GrammarSpec | None = None
        forced: tuple[int, ...] = ()
        if self.constraint is not None:
            grammar = self.constraint.grammar
            # What was not sampled has no log-probability, and is not looked through for stop strings.
            if common.sampling.logprobs < 0 and not common.stop:
                forced = self.constraint.forced_token_ids
        return plan.with_common(
            sampling=msgspec.structs.replace(common.sampling, grammar=grammar),
            forced_token_ids=forced,
            skip_special_tokens=common.skip_special_tokens and not self.answer.needs_special_tokens,
            thinking=self.thinking,
            make_end_check=None if self.answer.max_calls is None else self.answer.end_check,
            num_prompt_characters=len(self.text),
            message_starts=self.message_starts,
            num_opening_tokens=self.num_opening_tokens,
        )

    def pipelines(
        self, count: int, new_id: Callable[[], str], *, skip_special_tokens: bool = True
    ) -> list[OutputPipeline]:
        """One for each of `count` sequences. `new_id` gives 32 digits never given before.

        `skip_special_tokens` is the client's wish: what a parser needs of them is not shown.
        """
        return [
            self.answer.pipeline(lambda: call_id(new_id()), keeps_special_tokens=not skip_special_tokens)
            for _ in range(count)
        ]


def call_id(digits: str) -> str:
    """A tool call's id, as OpenAI writes them; parsers with rules of their own make theirs of it."""
    return f"call_{digits[-24:]}"


async def encode_conversation(
    model: ServedModel,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
    thinking_token_budget: int | None = None,
    insists_on_budget: bool = True,
    structured: StructuredOutput | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    kwargs: Mapping[str, Any],
) -> ChatPrompt:
    """Render and tokenise. A template writes the special tokens itself, so none are added unless asked for.

    Where nobody knows how the model thinks, a budget is an error, or moot if the request does not insist.

    Raises:
        InvalidRequestError: the tools or the choice are wrong, the template has no room for this
            conversation, the model has no template, its thinking cannot be limited, or the answer's form
            (`structured`, or that of a call) cannot be enforced.
    """
    specs = read_tools(tools)
    choice = read_tool_choice(tool_choice, specs, parallel=parallel_tool_calls)
    chat_format = await model.chat_format()
    render = partial(
        chat_format.render,
        messages,
        tools=specs,
        tool_choice=choice,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        may_think=thinking_token_budget != 0 and kwargs.get("enable_thinking") is not False,
        kwargs=kwargs,
    )
    try:
        rendered = await off_loop_if(len(messages) >= MANY_MESSAGES, render)
    except RecursionError as error:  # JSON within a string (a call's arguments) escapes the body's own limit
        raise InvalidRequestError("messages: nested too deeply", param="messages") from error
    texts = [rendered.text]
    if model.keeps_states:
        texts.append(_opening(rendered, messages))
    token_ids, *openings = await model.encode(texts, add_special_tokens=add_special_tokens)
    if rendered.answer.thinking_tags is None and not insists_on_budget:
        thinking_token_budget = None
    thinking = _thinking_params(model, rendered.answer, thinking_token_budget)
    constraint = await constrain(model, rendered.answer, structured)
    conversation = Conversation(
        messages=messages,
        tools=specs,
        tool_choice=choice,
        kwargs=kwargs,
        add_special_tokens=add_special_tokens,
    )
    return ChatPrompt(
        rendered.text,
        token_ids,
        rendered.message_starts,
        rendered.answer,
        thinking,
        constraint,
        conversation if add_generation_prompt else None,
        _num_common(token_ids, openings[0]) if openings else 0,
    )


def _opening(rendered: RenderedChat, messages: Sequence[dict[str, Any]]) -> str:
    """What comes before the first words of a user: system prompt and tools, most often."""
    starts = zip(messages, rendered.message_starts, strict=True)
    return rendered.text[: next((start for message, start in starts if message["role"] == "user"), 0)]


def _num_common(token_ids: list[int], opening: list[int]) -> int:
    """How many tokens of a text are those of its beginning, whose last ones may be joined to what follows."""
    # What is long is compared once: that takes milliseconds.
    length = max(0, len(opening) - MAX_JOINED_TOKENS)
    if token_ids[:length] != opening[:length]:
        return 0
    while length < min(len(opening), len(token_ids)) and token_ids[length] == opening[length]:
        length += 1
    return length


def _thinking_params(model: ServedModel, answer: AnswerFormat, budget: int | None) -> ThinkingParams | None:
    tags, reasoning = answer.thinking_tags, answer.reasoning
    if tags is None or reasoning is None:
        if budget is not None:
            raise InvalidRequestError(
                "thinking_token_budget: this server knows of no thinking of this model; where it does think, "
                "chat.reasoning_parser names the format",
                param="thinking_token_budget",
            )
        return None
    if budget is None:
        return ThinkingParams(tags=tags)
    closing = model.tokenizer.encode(reasoning.closing, add_special_tokens=False)
    return ThinkingParams(tags=tags, max_tokens=budget, closing_token_ids=tuple(closing))
