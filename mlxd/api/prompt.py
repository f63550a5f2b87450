"""Conversations into prompts: through the model's chat template, then its tokenizer.

It does not know dialects: messages and tools come in the shape that templates know, which is OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxd.api.served_model import ServedModel
from mlxd.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation, and its tokens."""

    text: str
    token_ids: list[int]


async def encode_conversation(
    model: ServedModel,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    kwargs: Mapping[str, Any],
) -> ChatPrompt:
    """Render and tokenise. A template writes the special tokens itself, so none are added unless asked for.

    Raises:
        InvalidRequestError: the template has no room for this conversation, or the model has no template.
    """
    template = await model.template()
    try:
        text = template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
    except RecursionError as error:  # JSON within a string (a call's arguments) escapes the body's own limit
        raise InvalidRequestError("messages: nested too deeply", param="messages") from error
    [token_ids] = await model.encode([text], add_special_tokens=add_special_tokens)
    return ChatPrompt(text, token_ids)
