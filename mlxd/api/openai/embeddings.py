"""POST /v1/embeddings.

It does not know how vectors are computed.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from mlxd.api.embedding_call import compute, embedding_model
from mlxd.api.http import HTTPRequest
from mlxd.api.openai.schema import Count, TokenId
from mlxd.api.services import Services
from mlxd.engine.embedding_input import EmbeddingInput
from mlxd.errors import InvalidRequestError
from mlxd.text.token_ids import in_vocabulary

if TYPE_CHECKING:
    from mlxd.api.embedding_model import EmbeddingModel
    from mlxd.engine.embedding_queue import Vectors

TruncateTokens = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
_MIXTURE = "expected a string, strings, token ids or lists of token ids, not a mixture"
NUMBERS_AT_ONCE = 16384
"""Written before others have their turn: about a millisecond."""


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings; what follows `user` is vLLM's, sentence-transformers' and Cohere's."""

    input: str | list[str | int | list[TokenId]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None
    truncate_prompt_tokens: TruncateTokens | None = None
    """cut at so many tokens, whatever the server does by itself; -1: at what the model takes"""
    add_special_tokens: bool | None = None
    prompt_name: str | None = None
    """one of the model's own prompts, put before each text"""
    input_type: str | None = None
    """query or document: the model's prompt for it, if it needs one"""


async def create_embeddings(request: HTTPRequest, services: Services) -> None:
    """A vector for each of one or several texts.

    With `dimensions` only the first so many numbers, at length 1 again, for models trained to be cut.
    """
    fields = await services.read(request, EmbeddingRequest)
    model = embedding_model(services)
    model.check_name(fields.model)
    if model.info.is_cross_encoder:
        raise InvalidRequestError(f"{model.name} scores pairs of texts: use /v1/rerank", param="model")
    size = model.info.size
    if fields.dimensions is not None and fields.dimensions > size:
        raise InvalidRequestError(
            f"dimensions: the model's vectors have {size}, {fields.dimensions} were asked for",
            param="dimensions",
        )
    inputs = await read_inputs(fields, model, services.config.embeddings.max_inputs)
    response_id = f"embd-{services.new_id()}"
    vectors, num_tokens = await compute(request, services, response_id, inputs)
    head = {
        "id": response_id,
        "object": "list",
        "created": int(services.now()),
        "model": model.name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    body = await render(head, vectors, fields.dimensions, as_base64=fields.encoding_format == "base64")
    await request.respond(200, body)


async def read_inputs(
    fields: EmbeddingRequest, model: EmbeddingModel, max_inputs: int
) -> list[EmbeddingInput]:
    """A string, strings, token ids, or lists of token ids.

    Raises:
        InvalidRequestError: a mixture of these, too many or none, an empty one, ids out of range, or an
            unknown prompt.
    """
    given = fields.input
    items: list[Any] = [given] if isinstance(given, str) else list(given)
    if not items:
        raise _invalid("at least one is needed")
    if isinstance(items[0], int):
        items = [items]

    def param(index: int) -> str:
        return "input" if len(items) == 1 else f"input[{index}]"

    if len(items) > max_inputs:
        raise _invalid(f"at most {max_inputs}, got {len(items)}")
    max_tokens = fields.truncate_prompt_tokens
    if max_tokens == 0:
        raise InvalidRequestError("truncate_prompt_tokens: 0 leaves nothing", param="truncate_prompt_tokens")
    if max_tokens == -1:
        max_tokens = model.info.max_model_len
    prompt = model.prompt(fields.prompt_name, fields.input_type)
    if all(isinstance(item, str) for item in items):
        inputs = await model.encode(
            items,
            prompt,
            max_tokens=max_tokens,
            add_special_tokens=fields.add_special_tokens is not False,
            param=param,
        )
    elif all(isinstance(item, list) for item in items):
        if prompt and (fields.prompt_name or fields.input_type):
            name = "prompt_name" if fields.prompt_name else "input_type"
            raise InvalidRequestError(f"{name}: goes before texts, not before token ids", param=name)
        if fields.add_special_tokens:
            raise InvalidRequestError(
                "add_special_tokens: token ids are taken as they are", param="add_special_tokens"
            )
        _check_token_ids(items, model.info.vocab_size, param)
        inputs = [
            EmbeddingInput(model.fit(ids, max_tokens, 0, param(index))) for index, ids in enumerate(items)
        ]
    else:
        raise _invalid(_MIXTURE)
    for index, item in enumerate(inputs):
        if not item.token_ids:
            raise _invalid("an empty text has no tokens to embed", param(index))
    return inputs


async def render(head: dict[str, Any], vectors: Vectors, dimensions: int | None, *, as_base64: bool) -> bytes:
    """The answer's JSON, written in parts between which others have their turn."""
    parts = [orjson.dumps(head)[:-1], b',"data":[']
    num_numbers = 0
    for index, vector in enumerate(vectors):
        if dimensions is not None:
            vector = vector[:dimensions]
            length = math.sqrt(vector @ vector)
            vector = vector / length if length else vector
        if as_base64:
            # Little-endian float32, as all machines have it that MLX runs on.
            embedding = b'"' + base64.b64encode(vector.tobytes()) + b'"'
        else:
            embedding = orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)
        parts += [
            b"," if index else b"",
            b'{"object":"embedding","index":%d,"embedding":' % index,
            embedding,
            b"}",
        ]
        num_numbers += len(vector)
        if num_numbers >= NUMBERS_AT_ONCE:
            num_numbers = 0
            await asyncio.sleep(0)
    parts.append(b"]}")
    return b"".join(parts)


def _check_token_ids(token_ids: list[list[int]], vocab_size: int, param: Callable[[int], str]) -> None:
    for index, ids in enumerate(token_ids):
        try:
            are_known = in_vocabulary(ids, vocab_size)
        except TypeError as error:
            raise _invalid(_MIXTURE) from error
        if not are_known:
            raise _invalid(f"token ids are from 0 to {vocab_size - 1}", param(index))


def _invalid(problem: str, param: str = "input") -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {problem}", param=param)
