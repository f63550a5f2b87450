"""What every handler is given: configuration, engine, the served model and what runs now.

It does not know routes or dialects.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import msgspec

from mlxd.api.body import BodyDecoder
from mlxd.api.caller import Caller, joined_salt
from mlxd.api.generation import ActiveGenerations, Generation
from mlxd.api.http import HTTPRequest
from mlxd.api.served_model import ServedModel
from mlxd.api.threads import LARGE_BODY_BYTES, off_loop_if
from mlxd.api.traffic import Traffic
from mlxd.api.turns import Turns
from mlxd.config import Config
from mlxd.engine.engine import Engine
from mlxd.engine.request import GenerationRequest
from mlxd.errors import InvalidRequestError
from mlxd.mcp.hub import McpHub

if TYPE_CHECKING:
    from mlxd.api.embedding_model import EmbeddingModel
    from mlxd.api.metrics import MetricsPage
    from mlxd.api.next_turn import NextTurns
    from mlxd.api.warm import Warmer

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Services:
    """One for an app. `now` gives Unix seconds, `new_id` 32 hexadecimal digits never given before."""

    config: Config
    engine: Engine
    model: ServedModel
    decoder: BodyDecoder
    active: ActiveGenerations
    traffic: Traffic
    metrics: MetricsPage | None
    """None where they are off"""
    mcp: McpHub | None
    """None where no MCP servers are configured"""
    now: Callable[[], float]
    new_id: Callable[[], str]
    embeddings: EmbeddingModel | None = None
    """None where none is configured"""
    next_turns: NextTurns | None = None
    """None where nothing is computed ahead"""
    warmer: Warmer | None = None
    """None where no prompts are computed at start"""
    turns: Turns = field(default_factory=Turns)

    async def read(self, request: HTTPRequest, into: type[T]) -> T:
        """The request's body as an `into`, when its turn has come; raises what `read_json_body` and `decode`
        do."""
        body = await request.read_json_body(self.config.server.max_body_bytes)
        await self.turns.wait()
        return await off_loop_if(len(body) >= LARGE_BODY_BYTES, lambda: self.decoder.decode(body, into))

    def submit(
        self, request: HTTPRequest, response_id: str, sequences: list[GenerationRequest]
    ) -> Generation:
        """Hand the sequences to the engine, as the caller's and at the caller's expense.

        Raises what Engine.submit does, and:
            RateLimitError: the prompts are more than the caller may have read now.
            InvalidRequestError: a priority that would pass those of the caller's key.
        """
        caller = request.caller
        # Choices of one prompt share its list, and `usage` too counts it once.
        prompts = {id(sequence.prompt_token_ids): len(sequence.prompt_token_ids) for sequence in sequences}
        num_prompt_tokens = sum(prompts.values())
        caller.account.check_tokens(num_prompt_tokens)
        if caller.name is not None and sequences[0].priority < 0:
            raise InvalidRequestError(
                "priority: 0 is the most urgent that this key allows; higher values run later",
                param="priority",
            )
        stream = self.engine.submit(
            [of_caller(sequence, caller, also_known_as=request.request_id) for sequence in sequences],
            timeout_from=request.arrival_time,
        )
        caller.account.take_tokens(num_prompt_tokens)
        request.access["prompt_tokens"] = request.access.get("prompt_tokens", 0) + num_prompt_tokens
        return Generation(response_id, stream, request, self.active)


def of_caller(sequence: GenerationRequest, caller: Caller, also_known_as: str = "") -> GenerationRequest:
    """The same, as the caller's: with its share, and its salt besides the request's own."""
    return msgspec.structs.replace(
        sequence,
        client=caller.client,
        weight=caller.weight,
        cache_salt=joined_salt(caller.cache_salt, sequence.cache_salt),
        priority=sequence.priority + caller.priority,
        also_known_as=also_known_as,
    )


Handler = Callable[[HTTPRequest, Services], Awaitable[None]]
