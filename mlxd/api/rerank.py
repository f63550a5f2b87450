"""POST /v1/rerank (also /v2/rerank and /rerank), in the shape of Jina's, Cohere's and vLLM's.

It does not know how scores are computed. A cross-encoder reads query and document together; with an embedding
model the score is the cosine of the angle between their vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from mlxd.api.embedding_call import compute, embedding_model
from mlxd.api.http import HTTPRequest
from mlxd.api.openai.embeddings import TruncateTokens
from mlxd.api.services import Services
from mlxd.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlxd.engine.embedding_queue import Vectors

CountOrZero = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class RerankDocument(msgspec.Struct, kw_only=True):
    text: str


class RerankRequest(msgspec.Struct, kw_only=True):
    """POST /v1/rerank"""

    query: str
    documents: list[str | RerankDocument]
    model: str | None = None
    top_n: CountOrZero | None = None
    """how many results; 0: all"""
    return_documents: bool | None = None
    """default: true"""
    truncate_prompt_tokens: TruncateTokens | None = None
    user: str | None = None


async def rerank(request: HTTPRequest, services: Services) -> None:
    """Documents in the order of their relevance to a query."""
    fields = await services.read(request, RerankRequest)
    model = embedding_model(services)
    model.check_name(fields.model)
    info = model.info
    max_documents = services.config.embeddings.max_inputs - 1
    if not 1 <= len(fields.documents) <= max_documents:
        raise InvalidRequestError(
            f"documents: from 1 to {max_documents}, got {len(fields.documents)}", param="documents"
        )
    max_tokens = fields.truncate_prompt_tokens
    if max_tokens == 0:
        raise InvalidRequestError("truncate_prompt_tokens: 0 leaves nothing", param="truncate_prompt_tokens")
    if max_tokens == -1:
        max_tokens = info.max_model_len
    texts = [item if isinstance(item, str) else item.text for item in fields.documents]
    if info.is_cross_encoder:
        inputs = await model.encode_pairs(fields.query, texts, max_tokens=max_tokens)
    else:
        query, document = model.prompt(None, "query"), model.prompt(None, "document")
        inputs = await model.encode([fields.query], query, max_tokens=max_tokens, param=lambda _: "query")
        inputs += await model.encode(texts, document, max_tokens=max_tokens, param="documents[{}]".format)
    for place, item in enumerate(inputs):
        if not item.token_ids:  # not every tokenizer adds some of its own
            # A cross-encoder's pair has none only where the query has none either.
            param = "query" if info.is_cross_encoder or not place else f"documents[{place - 1}]"
            raise InvalidRequestError(f"{param}: an empty text has no tokens to score", param=param)
    response_id = f"rerank-{services.new_id()}"
    vectors, num_tokens = await compute(request, services, response_id, inputs)
    scores = vectors[:, 0].tolist() if info.is_cross_encoder else cosines(vectors)
    best = sorted(range(len(texts)), key=lambda index: -scores[index])[: fields.top_n or None]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
    if fields.return_documents is not False:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    await request.respond_json(
        200,
        {
            "id": response_id,
            "model": model.name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            "results": results,
        },
    )


def cosines(vectors: Vectors) -> list[float]:
    """Of the first vector with each of the others."""
    products = vectors[1:] @ vectors[0]
    squares = (vectors * vectors).sum(axis=1)
    lengths = (squares[1:] * squares[0]) ** 0.5
    values: list[float] = (products / lengths.clip(1e-12)).tolist()
    return values
