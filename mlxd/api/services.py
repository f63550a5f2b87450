"""What every handler is given: configuration, engine, the served model and what runs now.

It does not know routes or dialects.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from mlxd.api.body import BodyDecoder
from mlxd.api.generation import ActiveGenerations, Generation
from mlxd.api.http import HTTPRequest
from mlxd.api.served_model import ServedModel
from mlxd.config import Config
from mlxd.engine.engine import Engine
from mlxd.engine.request import GenerationRequest

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Services:
    """One for an app. `now` gives Unix seconds, `new_id` 32 hexadecimal digits never given before."""

    config: Config
    engine: Engine
    model: ServedModel
    decoder: BodyDecoder
    active: ActiveGenerations
    now: Callable[[], float]
    new_id: Callable[[], str]

    async def read(self, request: HTTPRequest, into: type[T]) -> T:
        """The request's body as an `into`; raises what `read_json_body` and `decode` do."""
        body = await request.read_json_body(self.config.server.max_body_bytes)
        return self.decoder.decode(body, into)

    def submit(
        self, request: HTTPRequest, response_id: str, sequences: list[GenerationRequest]
    ) -> Generation:
        """Hand the sequences to the engine; raises what Engine.submit does."""
        return Generation(response_id, self.engine.submit(sequences), request, self.active)


Handler = Callable[[HTTPRequest, Services], Awaitable[None]]
