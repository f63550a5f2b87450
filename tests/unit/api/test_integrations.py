"""Calls that Open WebUI and Olla make, as their sources write them (read 2026-11-22), and what they read of
the answers.

Open WebUI: backend/open_webui/routers/openai.py, retrieval/utils.py, retrieval/models/external.py. Olla:
internal/adapter/health/client.go, adapter/discovery/http_client.go, config/profiles/vllm-mlx.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.unit.api import test_embeddings as embedder
from tests.unit.api.anthropic.events import read_events
from tests.unit.api.fakes import FakeEngine, call, make_app, says, sse_json

folder = embedder.folder

KEYS = {"limits": {"api_keys": [{"key": "secret"}]}}
OPEN_WEB_UI = {
    "content-type": "application/json",
    "authorization": "Bearer secret",
    "x-openwebui-user-name": "Ann%20Lee",
    "x-openwebui-user-id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",
    "x-openwebui-user-email": "ann@example.org",
    "x-openwebui-user-role": "user",
    "x-openwebui-chat-id": "c1",
}
OLLA = {
    "x-olla-request-id": "req-1",
    "x-forwarded-for": "192.0.2.7",
    "x-forwarded-host": "olla:40114",
    "x-forwarded-proto": "http",
    "x-proxied-by": "Olla/v0.0.24",
    "via": "1.1 olla",
}


class OllaModel(msgspec.Struct):
    """What Olla decodes of a model; Go's decoder fails where a type differs."""

    id: str
    object: str
    owned_by: str
    created: int


class OllaModels(msgspec.Struct):
    object: str
    data: list[OllaModel]


# Open WebUI


def test_open_webui_lists_models() -> None:
    """The check of a connection, too; its headers and a path under /v1 are all it needs."""
    answer = call(make_app(FakeEngine(), KEYS), "GET", "/v1/models", headers=OPEN_WEB_UI)
    assert answer.status_code == 200
    [model] = answer.json()["data"]
    assert model["id"] == "org/tiny-model" and model.get("name", model["id"]) is not None
    refused = call(make_app(FakeEngine(), KEYS), "GET", "/v1/models")
    assert refused.status_code == 401 and "error" in refused.json()


def test_open_webui_chats() -> None:
    body = {
        "stream": True,
        "model": "org/tiny-model",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}],
            },
        ],
        "temperature": 0.7,
        "max_tokens": 128,
        "stop": ["END"],
        "reasoning": {"effort": "low"},
        "stream_options": {"include_usage": True},
    }
    engine = FakeEngine(says("Hello"))
    answer = call(make_app(engine, KEYS), "POST", "/v1/chat/completions", json=body, headers=OPEN_WEB_UI)
    assert answer.status_code == 200 and "text/event-stream" in answer.headers["content-type"]
    text, usage = "", None
    for chunk in sse_json(answer.content):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
    assert text == "Hello" and usage is not None and usage["completion_tokens"] == 6
    assert (engine.submitted[0].max_tokens, engine.submitted[0].stop) == (128, ("END",))


def test_open_webui_asks_for_a_title() -> None:
    body = {
        "model": "org/tiny-model",
        "messages": [{"role": "user", "content": "Generate a concise title."}],
        "stream": False,
        "max_completion_tokens": 1000,
    }
    answer = call(
        make_app(FakeEngine(says('{"title": "Hi"}')), KEYS),
        "POST",
        "/v1/chat/completions",
        json=body,
        headers=OPEN_WEB_UI,
    )
    assert answer.json()["choices"][0]["message"]["content"] == '{"title": "Hi"}'


def test_open_webui_shows_errors() -> None:
    """It passes on the status and the JSON; an error inside a 200 would hang its stream."""
    body = {"model": "gone", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    answer = call(make_app(FakeEngine()), "POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 404 and answer.headers["content-type"].startswith("application/json")
    assert answer.json()["error"]["message"]


def test_open_webui_embeds_and_reranks(folder: Path) -> None:
    """It sends no encoding_format and wants floats, and reads index and relevance_score."""
    answers: list[httpx.Response] = []

    async def script(server: embedder.Server, http: httpx.AsyncClient) -> None:
        texts = {"input": ["a b", "c"], "model": "org/tiny-embedder"}
        answers.append(await http.post("/v1/embeddings", json=texts, headers=OPEN_WEB_UI))
        pairs = {"model": "org/tiny-embedder", "query": "a", "documents": ["c", "a"], "top_n": 2}
        answers.append(await http.post("/v1/rerank", json=pairs, headers=OPEN_WEB_UI))

    embedder.play(folder, script)
    vectors, ranking = (answer.json() for answer in answers)
    assert [entry["embedding"] for entry in vectors["data"]] == [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    results = sorted(ranking["results"], key=lambda result: int(result["index"]))
    first, second = (result["relevance_score"] for result in results)
    assert second > first


# Olla


def test_olla_checks_health() -> None:
    headers = {
        "user-agent": "Olla-HealthChecker/v0.0.24",
        "accept": "application/json, text/plain, */*",
        "cache-control": "no-cache",
    }
    answer = call(make_app(FakeEngine(), KEYS), "GET", "/health", headers=headers)
    assert answer.status_code == 200 and answer.json()["status"] == "healthy"
    engine = FakeEngine()
    engine.unhealthy = "no heartbeat"
    assert call(make_app(engine), "GET", "/health", headers=headers).status_code == 503


def test_olla_discovers_the_model() -> None:
    """With its profile, and by trying: Ollama's and LM Studio's paths must not answer 200."""
    app = make_app(FakeEngine())
    for path in ("/api/tags", "/api/v0/models"):
        assert call(app, "GET", path).status_code == 404
    headers = {"user-agent": "Olla-Discovery/v0.0.24", "accept": "application/json"}
    answer = call(app, "GET", "/v1/models", headers=headers)
    models = msgspec.json.decode(answer.content, type=OllaModels)
    assert models.object == "list" and len(models.data) == 1
    assert (models.data[0].id, models.data[0].object) == ("org/tiny-model", "model")
    assert models.data[0].owned_by == "vllm-mlx", "by which Olla knows the backend"


def test_olla_forwards_requests() -> None:
    """Its headers change nothing, and those that it adds to answers are left to it."""
    ask: dict[str, Any] = {"model": "org/tiny-model", "messages": [{"role": "user", "content": "Hi"}]}
    answer = call(make_app(FakeEngine()), "POST", "/v1/chat/completions", json=ask, headers=OLLA)
    body = answer.json()
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-olla")]
    assert (body["model"], body["choices"][0]["finish_reason"]) == ("org/tiny-model", "stop")
    assert body["usage"].keys() >= {"prompt_tokens", "completion_tokens", "total_tokens"}
    streamed = call(
        make_app(FakeEngine()), "POST", "/v1/chat/completions", json={**ask, "stream": True}, headers=OLLA
    )
    assert streamed.content.endswith(b"data: [DONE]\n\n")


def test_olla_passes_anthropic_requests_through() -> None:
    ask = {"model": "org/tiny-model", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    app = make_app(FakeEngine())
    assert call(app, "POST", "/v1/messages", json=ask, headers=OLLA).json()["stop_reason"] == "end_turn"
    streamed = call(app, "POST", "/v1/messages", json={**ask, "stream": True}, headers=OLLA)
    assert read_events(streamed.content)[0]["type"] == "message_start"
    assert call(app, "POST", "/v1/messages/count_tokens", json=ask, headers=OLLA).status_code == 200
