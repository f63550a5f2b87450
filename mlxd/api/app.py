"""The ASGI application: lifespan, routes, authentication, and the one place where errors become answers.

It does not know sockets, and leaves what a path does to its handler.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxd.api import admin, tokenize
from mlxd.api.anthropic.messages import count_tokens, create_message
from mlxd.api.auth import ApiKeys
from mlxd.api.body import BodyDecoder
from mlxd.api.cache import cache_stats, clear_cache, create_pin, delete_pin, list_pins
from mlxd.api.cors import Cors
from mlxd.api.errors import drop_tracebacks, error_headers, error_response, is_anthropic_path
from mlxd.api.gate import Gate
from mlxd.api.generation import ActiveGenerations
from mlxd.api.http import Headers, HTTPRequest, Receive, Scope, Send
from mlxd.api.limits import RateLimiter
from mlxd.api.mcp import execute_tool, list_servers, list_tools
from mlxd.api.next_turn import NextTurns
from mlxd.api.openai import models
from mlxd.api.openai.chat import create_chat_completion
from mlxd.api.openai.completions import create_completion
from mlxd.api.openai.embeddings import create_embeddings
from mlxd.api.openapi import OpenApiDocument
from mlxd.api.proxies import TrustedProxies
from mlxd.api.rerank import rerank
from mlxd.api.router import Router
from mlxd.api.served_model import ServedModel
from mlxd.api.services import Handler, Services
from mlxd.api.traffic import Traffic
from mlxd.api.warm import Warmer, read_warm_prompts
from mlxd.api.web_page import web_page
from mlxd.config import Config
from mlxd.engine.engine import Engine
from mlxd.errors import (
    ClientClosedRequest,
    HTTPStatusError,
    InternalError,
    NotReadyError,
    RateLimitError,
)
from mlxd.mcp.hub import McpHub

if TYPE_CHECKING:
    from mlxd.engine.embedding_engine import EmbeddingEngine

logger = logging.getLogger("mlxd.api")

PUBLIC_PATHS = frozenset({"/health", "/health/ready", "/metrics", "/openapi.json"})
"""Never authenticated nor limited: load balancers, scrapers and readers of the description have no keys."""
UNLIMITED_ROUTES = frozenset({"/v1/requests/{id}/cancel"})
"""POSTs that no rate limit counts: who has reached it may still stop what runs."""

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/chat/completions", create_chat_completion),
    ("POST", "/v1/completions", create_completion),
    ("POST", "/v1/embeddings", create_embeddings),
    ("POST", "/v1/rerank", rerank),
    ("POST", "/v2/rerank", rerank),
    ("POST", "/rerank", rerank),
    ("POST", "/v1/messages", create_message),
    ("POST", "/v1/messages/count_tokens", count_tokens),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{id}", models.get_model),
    ("POST", "/tokenize", tokenize.tokenize),
    ("POST", "/detokenize", tokenize.detokenize),
    ("GET", "/health", admin.health),
    ("GET", "/health/ready", admin.ready),
    ("GET", "/v1/status", admin.status),
    ("GET", "/metrics", admin.metrics),
    ("POST", "/v1/requests/{id}/cancel", admin.cancel),
    ("DELETE", "/v1/requests/{id}", admin.cancel),
    ("GET", "/v1/cache/stats", cache_stats),
    ("DELETE", "/v1/cache", clear_cache),
    ("POST", "/v1/cache/pins", create_pin),
    ("GET", "/v1/cache/pins", list_pins),
    ("DELETE", "/v1/cache/pins/{id}", delete_pin),
    ("GET", "/v1/mcp/tools", list_tools),
    ("GET", "/v1/mcp/servers", list_servers),
    ("GET", "/v1/mcp/status", list_servers),
    ("POST", "/v1/mcp/execute", execute_tool),
    ("GET", "/v1/requests/{id}", admin.describe_request),
)


class App:
    """An ASGI 3 callable, for mlxd's own server and any other."""

    def __init__(self, services: Services, gate: Gate, cors: Cors) -> None:
        self._services = services
        self._gate = gate
        self._cors = cors
        self._router: Router[Handler] = Router()
        for method, path, handler in ROUTES:
            self._router.add(method, path, handler)
        description = OpenApiDocument(ROUTES, PUBLIC_PATHS, needs_key=bool(services.config.limits.api_keys))
        self._router.add("GET", "/openapi.json", description)
        self._public_paths = PUBLIC_PATHS
        if services.config.server.web_page:
            page = web_page()
            for path, file in page.items():
                self._router.add("GET", path, file)
            self._public_paths |= page.keys()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._count(HTTPRequest(scope, receive, send))
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            raise NotImplementedError(f"no {scope['type']} here")

    def end_streams(self) -> None:
        """The shutdown deadline has come: every running answer gets its last, proper frame, and what is about
        to begin is refused, because it could not be ended so any more."""
        error = NotReadyError("the server is shutting down")
        self._services.engine.end_all(error)
        self._services.active.end_between_streams(error)
        if self._services.embeddings is not None:
            self._services.embeddings.engine.end_all(error)

    def describe_error(
        self, error: HTTPStatusError, path: str, request_id: str, headers: Headers
    ) -> tuple[int, dict[str, Any], Headers]:
        """Status, body and headers of an answer that the server gives in the application's place."""
        status, body = error_response(error, path, request_id)
        origin = next((value for name, value in headers if name == b"origin"), None)
        return status, body, [*self._headers(path, request_id, origin), *error_headers(error)]

    def _headers(self, path: str, request_id: str, origin: bytes | None) -> Headers:
        """What every answer carries beside x-request-id."""
        headers = self._cors.headers(origin)
        if is_anthropic_path(path):  # whose SDKs look for the id under this name
            headers.append((b"request-id", request_id.encode()))
        return headers

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        embeddings = self._services.embeddings
        await receive()
        try:
            await self._services.engine.start()
            if embeddings is not None:
                await embeddings.engine.start()
        except Exception as error:
            logger.exception("cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        tools = self._services.mcp
        if tools is not None:
            tools.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._services.warmer is not None:
            self._services.warmer.stop()
        if self._services.next_turns is not None:
            self._services.next_turns.stop()
        if tools is not None:
            await tools.stop()
        # The server has waited for the running answers already.
        await self._services.engine.stop(0.0)
        if embeddings is not None:
            await embeddings.engine.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _count(self, request: HTTPRequest) -> None:
        traffic = self._services.traffic
        traffic.num_in_flight += 1
        try:
            await self._http(request)
        finally:
            traffic.num_in_flight -= 1
            traffic.count(request)

    async def _http(self, request: HTTPRequest) -> None:
        origin = request.header(b"origin")
        request.response_headers += self._headers(request.path, request.request_id, origin)
        try:
            await self._dispatch(request)
        except HTTPStatusError as error:
            await self._answer_error(request, error)
            drop_tracebacks(error)
        except Exception:
            logger.exception("bug", extra={"request_id": request.request_id, "path": request.path})
            if request.response_started:
                request.status = InternalError.status  # as the server's access line has it
                request.access["error"] = InternalError.code or InternalError.type
                raise
            bug = InternalError(f"internal error; request id {request.request_id}")
            await self._answer_error(request, bug)

    async def _dispatch(self, request: HTTPRequest) -> None:
        match = self._router.match(request.path)
        request.route, request.path_param = match.route, match.param
        if request.method == "OPTIONS":
            await request.respond_empty(
                [(b"allow", match.allow.encode()), *self._cors.preflight(request, match.allow)]
            )
            return
        handler = match.handler(request.method)
        if match.route not in self._public_paths:
            counted = request.method == "POST" and match.route not in UNLIMITED_ROUTES
            self._gate.admit(request, counted=counted)
        await handler(request, self._services)

    async def _answer_error(self, request: HTTPRequest, error: HTTPStatusError) -> None:
        if request.refused:
            return
        request.access["error"] = error.code or error.type
        if isinstance(error, RateLimitError):
            self._services.traffic.rate_limited[error.limit] += 1
        if request.client_gone:
            logger.info(
                "client left",
                extra={
                    "request_id": request.request_id,
                    "path": request.path,
                    "status": ClientClosedRequest.status,
                },
            )
            return
        status, body = error_response(error, request.path, request.request_id)
        try:
            await request.respond_json(status, body, error_headers(error))
        except ClientClosedRequest:
            logger.info("client left", extra={"request_id": request.request_id, "path": request.path})


def create_app(
    config: Config,
    engine: Engine,
    embedding_engine: EmbeddingEngine | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    now: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
    new_id: Callable[[], str] = lambda: secrets.token_hex(16),
    mcp: McpHub | None = None,
) -> App:
    """The app over `engine` and, if there is one, `embedding_engine`, which its lifespan starts and stops, as
    `mcp`: by default what the configuration names.

    Raises:
        ConfigError: an API key cannot be read, a trusted proxy is none, or a file that is named is wrong.
    """
    traffic = Traffic()
    embeddings = None
    if embedding_engine is not None:
        from mlxd.api.embedding_model import EmbeddingModel  # with numpy, which only its vectors need

        embeddings = EmbeddingModel(
            config.embeddings, embedding_engine, created=int(now()), owned_by=config.model.owned_by
        )
    metrics = None
    if config.server.metrics:
        from mlxd.api.metrics import MetricsPage  # prometheus_client takes 0.1 s to import

        metrics = MetricsPage(engine, traffic, embedding_engine)
    model = ServedModel(config.model, engine, created=int(now()), chat=config.chat)
    warmer = None
    if config.cache.warm_prompts is not None:
        warmer = Warmer(read_warm_prompts(Path(config.cache.warm_prompts)), engine, model)
    services = Services(
        config=config,
        engine=engine,
        model=model,
        decoder=BodyDecoder(config.server.max_json_depth, logger),
        active=ActiveGenerations(),
        traffic=traffic,
        metrics=metrics,
        mcp=mcp or McpHub.load(config.mcp, environ),
        now=now,
        new_id=new_id,
        embeddings=embeddings,
        next_turns=NextTurns(engine, model) if config.cache.prefill_answers else None,
        warmer=warmer,
    )
    gate = Gate(
        ApiKeys.load(config.limits.api_keys, environ),
        TrustedProxies(config.server.trusted_proxies),
        RateLimiter(config.limits, clock, now),
        isolates_keys=config.limits.isolate_keys,
    )
    return App(services, gate, Cors(config.server.cors_origins))
