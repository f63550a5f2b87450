"""GET /openapi.json: the API's description, made from the routes and the msgspec schemas.

It does not know what the handlers do. A route that it has no schemas for is described by its docstring alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
import orjson

from mlxd import __version__
from mlxd.api import responses
from mlxd.api.anthropic import responses as anthropic
from mlxd.api.anthropic.schema import CountTokensRequest, MessagesRequest
from mlxd.api.cache import PinRequest
from mlxd.api.errors import is_anthropic_path
from mlxd.api.http import HTTPRequest
from mlxd.api.mcp import McpExecuteRequest
from mlxd.api.openai import responses as openai
from mlxd.api.openai.embeddings import EmbeddingRequest
from mlxd.api.openai.schema import ChatCompletionRequest, CompletionRequest
from mlxd.api.rerank import RerankRequest
from mlxd.api.services import Handler, Services
from mlxd.api.tokenize import DetokenizeRequest, TokenizeRequest

Schema = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"

_STATUSES = (400, 408, 414, 431, 500, 503)
"""What any request can be answered with, whatever it asks for."""
_STATUSES_OF_BODIES = (404, 413, 415, 429, 499, 504)
_TEXT = {"schema": {"type": "string"}}
_EVENTS = {
    "schema": {
        "type": "object",
        "description": "One of the stream's events; `data` is JSON, or OpenAI's closing [DONE].",
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        "required": ["data"],
    }
}
"""Before OpenAPI 3.2, which few tools know, the schema of an event stream is that of each event."""
_WORD_BREAKS = str.maketrans("/", "_", "{}")
_OWN_WORDS = {499: "Cancelled by its id", 529: "Overloaded"}


@dataclass(frozen=True, slots=True)
class Operation:
    """A route's schemas: its body, and the JSON of its answer. `streams`: or an event stream in its place.

    `unready` is the JSON of a 503 that is no error. `text_type` is the media type of an answer that is no
    JSON. `is_optional`: the configuration may turn it off. `statuses` are those that no other route has.
    """

    request: type | None = None
    response: type | None = None
    streams: bool = False
    unready: type | None = None
    text_type: str | None = None
    is_optional: bool = False
    statuses: tuple[int, ...] = ()


OPERATIONS = {
    ("POST", "/v1/chat/completions"): Operation(
        ChatCompletionRequest, openai.ChatCompletion, streams=True, statuses=(502,)
    ),
    ("POST", "/v1/completions"): Operation(CompletionRequest, openai.Completion, streams=True),
    ("POST", "/v1/embeddings"): Operation(EmbeddingRequest, openai.EmbeddingList),
    ("POST", "/v1/rerank"): Operation(RerankRequest, responses.Ranking),
    ("POST", "/v2/rerank"): Operation(RerankRequest, responses.Ranking),
    ("POST", "/rerank"): Operation(RerankRequest, responses.Ranking),
    ("POST", "/v1/messages"): Operation(MessagesRequest, anthropic.MessageResponse, streams=True),
    ("POST", "/v1/messages/count_tokens"): Operation(CountTokensRequest, anthropic.TokenCount),
    ("GET", "/v1/models"): Operation(response=openai.ModelList),
    ("GET", "/v1/models/{id}"): Operation(response=openai.Model),
    ("POST", "/tokenize"): Operation(TokenizeRequest, responses.Tokens),
    ("POST", "/detokenize"): Operation(DetokenizeRequest, responses.DecodedPrompt),
    ("GET", "/health"): Operation(response=responses.Health, unready=responses.Health),
    ("GET", "/health/ready"): Operation(response=responses.Health, unready=responses.Health),
    ("GET", "/v1/status"): Operation(response=responses.ServerStatus),
    ("GET", "/metrics"): Operation(text_type="text/plain", is_optional=True),
    ("POST", "/v1/requests/{id}/cancel"): Operation(response=responses.CancelledRequest),
    ("DELETE", "/v1/requests/{id}"): Operation(response=responses.CancelledRequest),
    ("GET", "/v1/cache/stats"): Operation(response=responses.CacheStatus),
    ("DELETE", "/v1/cache"): Operation(response=responses.ClearedCache, statuses=(403,)),
    ("POST", "/v1/cache/pins"): Operation(PinRequest, responses.Pin),
    ("GET", "/v1/cache/pins"): Operation(response=responses.PinList),
    ("DELETE", "/v1/cache/pins/{id}"): Operation(response=responses.DeletedPin),
    ("GET", "/v1/mcp/tools"): Operation(response=responses.McpTools),
    ("GET", "/v1/mcp/servers"): Operation(response=responses.McpServers),
    ("GET", "/v1/mcp/status"): Operation(response=responses.McpServers),
    ("POST", "/v1/mcp/execute"): Operation(McpExecuteRequest, responses.McpResult),
    ("GET", "/v1/requests/{id}"): Operation(response=responses.RequestDetails),
}


class OpenApiDocument:
    """A handler that answers with the document, which is made when it is first asked for."""

    def __init__(
        self, routes: Sequence[tuple[str, str, Handler]], public_paths: frozenset[str], *, needs_key: bool
    ) -> None:
        self._routes = routes
        self._public_paths = public_paths
        self._needs_key = needs_key
        self._body: bytes | None = None

    async def __call__(self, request: HTTPRequest, services: Services) -> None:
        """This description."""
        if self._body is None:
            self._body = orjson.dumps(self.describe())
        await request.respond(200, self._body)

    def describe(self) -> dict[str, Any]:
        """The document, in OpenAPI 3.1, whose schemas are JSON Schema's own."""
        types: set[type] = {openai.ErrorResponse, anthropic.MessageErrorResponse}
        for operation in OPERATIONS.values():
            named = (operation.request, operation.response, operation.unready)
            types.update(type_ for type_ in named if type_ is not None)
        ordered = sorted(types, key=lambda type_: type_.__name__)
        references, components = msgspec.json.schema_components(ordered, ref_template=_REFERENCE)
        schemas = dict(zip(ordered, references, strict=True))
        paths: dict[str, dict[str, Any]] = {}
        for method, path, handler in self._routes:
            paths.setdefault(path, {})[method.lower()] = self._operation(method, path, handler, schemas)
        document: dict[str, Any] = {
            "openapi": "3.1.0",
            "info": {"title": "mlxd", "version": __version__, "description": "An LLM server on MLX."},
            "paths": paths,
            "components": {"schemas": components},
        }
        if self._needs_key:
            document["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        return document

    def _operation(
        self, method: str, path: str, handler: Handler, schemas: dict[type, Schema]
    ) -> dict[str, Any]:
        known = OPERATIONS.get((method, path), Operation())
        summary, _, details = (inspect.getdoc(handler) or path).partition("\n")
        described: dict[str, Any] = {
            "operationId": f"{method.lower()}_{path.strip('/').translate(_WORD_BREAKS) or 'index'}",
            "summary": summary,
            "responses": self._responses(path, known, schemas),
        }
        if details.strip():
            described["description"] = details.strip()
        if "{id}" in path:
            described["parameters"] = [
                {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            ]
        if known.request is not None:
            described["requestBody"] = {"required": True, "content": _json(schemas[known.request])}
        if self._needs_key and path not in self._public_paths:
            described["security"] = [{"bearer": []}, {"x-api-key": []}]
        return described

    def _responses(self, path: str, known: Operation, schemas: dict[type, Schema]) -> dict[str, Any]:
        content = _json({} if known.response is None else schemas[known.response])
        if known.streams:
            content["text/event-stream"] = _EVENTS
        if known.text_type is not None:
            content = {known.text_type: _TEXT}
        answers = {"200": {"description": "OK", "content": content}}
        is_anthropic = is_anthropic_path(path)
        error = schemas[anthropic.MessageErrorResponse if is_anthropic else openai.ErrorResponse]
        for status in sorted(self._error_statuses(path, known, is_anthropic)):
            body = schemas[known.unready] if status == 503 and known.unready is not None else error
            words = _OWN_WORDS.get(status) or HTTPStatus(status).phrase
            answers[str(status)] = {"description": words, "content": _json(body)}
        return answers

    def _error_statuses(self, path: str, known: Operation, is_anthropic: bool) -> set[int]:
        statuses = {*_STATUSES, *known.statuses}
        if known.request is not None:
            statuses |= set(_STATUSES_OF_BODIES)
        if "{id}" in path or known.is_optional:
            statuses.add(404)
        if path not in self._public_paths:
            statuses.add(429)
            if self._needs_key:
                statuses.add(401)
        if is_anthropic:
            statuses = statuses - {503} | {529}
        return statuses


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
