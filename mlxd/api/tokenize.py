"""POST /tokenize and /detokenize, in vLLM's shapes.

It does not know how texts become tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from mlxd.api.http import HTTPRequest
from mlxd.api.openai.chat import encode_chat
from mlxd.api.openai.schema import ChatMessage, TokenId
from mlxd.api.served_model import INLINE_LENGTH, ServedModel
from mlxd.api.services import Services
from mlxd.api.threads import off_loop_if
from mlxd.errors import InvalidRequestError
from mlxd.text.token_ids import in_vocabulary

ITEMS_AT_ONCE = 16384
"""Written in a fraction of a millisecond."""


class PromptFields(msgspec.Struct, kw_only=True):
    """Either `prompt`, or `messages` to be rendered by the chat template first."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """default: true for a prompt, false for messages, whose template writes them"""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None


class TokenizeRequest(PromptFields, kw_only=True):
    """POST /tokenize"""

    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[TokenId]
    model: str | None = None


async def tokenize(request: HTTPRequest, services: Services) -> None:
    """`{count, max_model_len, tokens, token_strs}`"""
    fields = await services.read(request, TokenizeRequest)
    model = services.model
    model.check_name(fields.model)
    tokens = await encode_prompt(fields, model)

    def write() -> bytes:
        texts = list(map(model.tokenizer.token_text, tokens)) if fields.return_token_strs else None
        answer = {
            "count": len(tokens),
            "max_model_len": model.max_model_len,
            "tokens": _array(tokens),
            "token_strs": None if texts is None else _array(texts),
        }
        return orjson.dumps(answer)

    await request.respond(200, await off_loop_if(len(tokens) > INLINE_LENGTH, write))


def _array(items: Sequence[int | str]) -> orjson.Fragment:
    """`items` as JSON, written in parts between which other threads have their turn: orjson keeps the GIL."""
    parts = (orjson.dumps(items[at : at + ITEMS_AT_ONCE]) for at in range(0, len(items), ITEMS_AT_ONCE))
    return orjson.Fragment(b"[" + b",".join(part[1:-1] for part in parts) + b"]")


async def detokenize(request: HTTPRequest, services: Services) -> None:
    """`{prompt}`, special tokens included."""
    fields = await services.read(request, DetokenizeRequest)
    model = services.model
    model.check_name(fields.model)
    if not in_vocabulary(fields.tokens, model.vocab_size):
        raise InvalidRequestError(f"tokens: token ids are below {model.vocab_size}", param="tokens")
    text = await model.decode(fields.tokens, skip_special_tokens=False)
    await request.respond_json(200, {"prompt": text})


async def encode_prompt(fields: PromptFields, model: ServedModel) -> list[int]:
    """The token ids of a prompt or a conversation. Raises InvalidRequestError."""
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("prompt: give either prompt or messages", param="prompt")
    if fields.messages is not None:
        prompt = await encode_chat(
            model,
            fields.messages,
            tools=fields.tools,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            add_special_tokens=fields.add_special_tokens,
            kwargs=fields.chat_template_kwargs or {},
        )
        return prompt.token_ids
    assert fields.prompt is not None
    [tokens] = await model.encode([fields.prompt], add_special_tokens=fields.add_special_tokens is not False)
    return tokens
