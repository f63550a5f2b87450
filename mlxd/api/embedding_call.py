"""A running call of the embedding engine: charged to its caller, ended when the client leaves or cancels.

It does not know what the vectors are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxd.api.http import HTTPRequest
from mlxd.api.services import Services
from mlxd.engine.embedding_input import EmbeddingInput
from mlxd.errors import ClientClosedRequest, HTTPStatusError, NotFoundError

if TYPE_CHECKING:
    from mlxd.api.embedding_model import EmbeddingModel
    from mlxd.engine.embedding_engine import EmbeddingEngine
    from mlxd.engine.embedding_queue import Job, Vectors


def embedding_model(services: Services) -> EmbeddingModel:
    """Raises NotFoundError where the server has none."""
    if services.embeddings is None:
        raise NotFoundError(
            "this server has no embedding model; its operator can add one with --embedding-model",
            param="model",
            code="model_not_found",
        )
    return services.embeddings


class EmbeddingCall:
    """It, as a Cancellable for ActiveGenerations."""

    __slots__ = ("_engine", "_job", "client_name", "ids")

    def __init__(self, response_id: str, request: HTTPRequest, engine: EmbeddingEngine, job: Job) -> None:
        self.ids = (response_id, request.request_id)
        self.client_name = request.caller.name
        self._engine = engine
        self._job = job

    def end(self, cause: HTTPStatusError) -> None:
        """End it early. The first cause counts."""
        self._engine.end(self._job, cause)


async def compute(
    request: HTTPRequest, services: Services, response_id: str, inputs: Sequence[EmbeddingInput]
) -> tuple[Vectors, int]:
    """The inputs' vectors, float32 [len(inputs), size], and the number of their tokens.

    Raises what EmbeddingEngine.submit and its job do, and:
        RateLimitError: the inputs are more than the caller may have read now.
        ClientClosedRequest: the client left, or cancelled the request by its id.
    """
    engine, account = embedding_model(services).engine, request.caller.account
    num_tokens = sum(len(item.token_ids) for item in inputs)
    account.check_tokens(num_tokens)
    job = engine.submit(inputs, timeout_from=request.arrival_time)
    account.take_tokens(num_tokens)
    request.access["prompt_tokens"], request.access["completion_tokens"] = num_tokens, 0
    call = EmbeddingCall(response_id, request, engine, job)

    async def watch_client() -> None:
        await request.disconnected()
        call.end(ClientClosedRequest("the client left"))

    watcher = asyncio.get_running_loop().create_task(watch_client())
    services.active.add(call)
    try:
        return await job.future, num_tokens
    finally:
        services.active.remove(call)
        watcher.cancel()
