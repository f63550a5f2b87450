"""The application around the handlers: routes, ids, CORS, errors, health, start and stop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlxd.api.errors import error_response
from mlxd.errors import NotReadyError, OverloadedError, RateLimitError
from tests.unit.api.asking import BODY, CHAT, error_of
from tests.unit.api.fakes import MAX_MODEL_LEN, TEMPLATE, FakeEngine, call, make_app, with_defaults

# Routes


def test_unknown_path_is_404_in_the_dialect_of_its_prefix() -> None:
    response = call(make_app(FakeEngine()), "GET", "/v1/nothing")
    assert response.status_code == 404
    assert (error_of(response)["type"], error_of(response)["code"]) == ("not_found_error", "not_found")
    response = call(make_app(FakeEngine()), "POST", "/v1/messages/nothing", headers={"x-request-id": "r1"})
    assert response.status_code == 404
    assert response.json() == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "no such path: /v1/messages/nothing"},
        "request_id": "r1",
    }


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "OPTIONS, POST"),
        ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
        ("PUT", "/v1/models/a/b", "GET, HEAD, OPTIONS"),
        ("PUT", "/v1/requests/x", "DELETE, GET, HEAD, OPTIONS"),
        ("DELETE", "/v1/requests/x/cancel", "OPTIONS, POST"),
    ],
)
def test_wrong_method_is_405_with_allow(method: str, path: str, allow: str) -> None:
    response = call(make_app(FakeEngine()), method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow
    assert error_of(response)["code"] == "method_not_allowed"


def test_head_has_the_headers_of_get_and_no_body() -> None:
    get = call(make_app(FakeEngine()), "GET", "/v1/models")
    head = call(make_app(FakeEngine()), "HEAD", "/v1/models")
    assert head.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == str(len(get.content))


def test_a_trailing_slash_and_a_root_path_are_forgiven() -> None:
    assert call(make_app(FakeEngine()), "GET", "/health/").status_code == 200
    sent: list[dict[str, Any]] = []

    async def under_prefix() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/p/health", "root_path": "/p", "headers": []}
        await make_app(FakeEngine())(scope, asyncio.Queue().get, send)

    asyncio.run(under_prefix())
    assert sent[0]["status"] == 200


def test_other_scopes_are_not_taken() -> None:
    with pytest.raises(NotImplementedError):
        asyncio.run(make_app(FakeEngine())({"type": "websocket"}, None, None))  # type: ignore[arg-type]


# Ids


@pytest.mark.parametrize("header", ["x-request-id", "x-olla-request-id"])
def test_sane_request_ids_are_kept(header: str) -> None:
    response = call(make_app(FakeEngine()), "GET", "/health", headers={header: "a.B-9_"})
    assert response.headers["x-request-id"] == "a.B-9_"


@pytest.mark.parametrize("value", ["", "a b", "x" * 129, "a;b"])
def test_others_are_replaced(value: str) -> None:
    response = call(make_app(FakeEngine()), "GET", "/health", headers={"x-request-id": value})
    assert len(response.headers["x-request-id"]) == 32


def test_errors_carry_a_request_id_too() -> None:
    response = call(make_app(FakeEngine()), "GET", "/nothing", headers={"x-request-id": "me"})
    assert response.headers["x-request-id"] == "me"


# CORS


def test_no_cors_headers_unless_configured() -> None:
    response = call(make_app(FakeEngine()), "GET", "/health", headers={"origin": "http://a"})
    assert not any(name.startswith("access-control") for name in response.headers)
    response = call(make_app(FakeEngine()), "OPTIONS", CHAT, headers={"origin": "http://a"})
    assert response.status_code == 204 and response.headers["allow"] == "OPTIONS, POST"
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (["*"], "http://a", "*"),
        (["http://a"], "http://a", "http://a"),
        (["http://a"], "http://b", None),
    ],
)
def test_cors(origins: list[str], origin: str, allowed: str | None) -> None:
    app = make_app(FakeEngine(), {"server": {"cors_origins": origins}})
    asked = {"origin": origin, "access-control-request-headers": "authorization"}
    preflight = call(app, "OPTIONS", CHAT, headers=asked)
    answer = call(app, "GET", "/nothing", headers={"origin": origin})
    assert preflight.headers.get("access-control-allow-origin") == allowed
    assert answer.headers.get("access-control-allow-origin") == allowed
    assert preflight.headers.get("access-control-allow-headers") == ("authorization" if allowed else None)


def test_a_page_may_read_every_header_that_sdks_go_by() -> None:
    config = {"server": {"cors_origins": ["*"]}, "limits": {"rate_limit": 1, "token_rate_limit": 1000}}
    engine = FakeEngine(files=with_defaults(chat_templates={"default": TEMPLATE}))
    engine.refusal = RateLimitError("no more", retry_after=7, headers={"x-should-retry": "false"})
    body = {**BODY, "model": "default", "max_tokens": 5}
    answer = call(make_app(engine, config), "POST", "/v1/messages", json=body)
    assert answer.status_code == 429
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    safelisted = {"content-type", "content-length", "cache-control"}
    own = {name for name in answer.headers if not name.startswith("access-control-")}
    assert own - safelisted == exposed


# Errors


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OverloadedError("full", retry_after=7), 503, "overloaded_error"),
        (NotReadyError("loading", retry_after=7), 503, "overloaded_error"),
        (RateLimitError("slower", retry_after=7), 429, "rate_limit_error"),
    ],
)
def test_refusals_of_the_engine_come_before_any_200(error: Any, status: int, kind: str) -> None:
    engine = FakeEngine()
    engine.refusal = error
    response = call(make_app(engine), "POST", CHAT, json={**BODY, "stream": True})
    assert response.status_code == status
    assert response.headers["retry-after"] == "7"
    assert error_of(response)["type"] == kind


def test_context_length_exceeded() -> None:
    body = {"messages": [{"role": "user", "content": "x" * MAX_MODEL_LEN}], "stream": True}
    response = call(make_app(FakeEngine()), "POST", CHAT, json=body)
    assert response.status_code == 400
    assert (error_of(response)["code"], error_of(response)["param"]) == (
        "context_length_exceeded",
        "messages",
    )


def test_bugs_are_500_without_internals(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.status = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    response = call(make_app(engine), "GET", "/v1/status", headers={"x-request-id": "rid"})
    assert response.status_code == 500
    error = error_of(response)
    assert (error["type"], error["code"]) == ("api_error", "internal_error")
    assert "rid" in error["message"] and "division" not in response.text
    [record] = caplog.records
    assert record.exc_info is not None and record.request_id == "rid"  # type: ignore[attr-defined]


def test_overload_is_529_to_anthropics_clients() -> None:
    status, body = error_response(OverloadedError("full", 1), "/v1/messages", "r")
    assert (status, body["error"]["type"]) == (529, "overloaded_error")
    status, body = error_response(NotReadyError("x"), "/v1/messagesX", "r")
    assert status == 503 and "type" not in body


# Health


def test_health_and_readiness() -> None:
    engine = FakeEngine()
    app = make_app(engine)
    assert call(app, "GET", "/health").json() == {"status": "healthy", "model": "org/tiny-model"}
    engine.not_ready = NotReadyError("the model is loading")
    assert call(app, "GET", "/health").status_code == 200
    response = call(app, "GET", "/health/ready")
    assert response.status_code == 503 and response.headers["retry-after"] == "2"
    assert response.json() == {"status": "not_ready", "reason": "the model is loading"}
    engine.not_ready, engine.unhealthy = None, "the heartbeat is old"
    for path in ("/health", "/health/ready"):
        response = call(app, "GET", path)
        assert response.status_code == 503
        assert response.json() == {"status": "unhealthy", "reason": "the heartbeat is old"}


def test_while_loading_503() -> None:
    engine = FakeEngine()
    engine.files = engine.tokenizer = engine.info = None
    engine.not_ready = NotReadyError("the model is loading")
    app = make_app(engine)
    for path, body in ((CHAT, BODY), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        response = call(app, "POST", path, json=body)
        assert response.status_code == 503 and error_of(response)["code"] == "not_ready"
    [model] = call(app, "GET", "/v1/models").json()["data"]
    assert model["max_model_len"] is None


def test_status_is_the_engines() -> None:
    assert call(make_app(FakeEngine()), "GET", "/v1/status").json() == {"status": "running", "num_running": 0}


# Lifespan


def drive_lifespan(engine: FakeEngine) -> list[str]:
    async def run() -> list[str]:
        inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        inbox.put_nowait({"type": "lifespan.startup"})
        inbox.put_nowait({"type": "lifespan.shutdown"})
        sent: list[str] = []

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await make_app(engine)({"type": "lifespan"}, inbox.get, send)
        return sent

    return asyncio.run(run())


def test_lifespan_starts_and_stops_the_engine() -> None:
    engine = FakeEngine()
    assert drive_lifespan(engine) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert engine.calls == ["start", "stop"]


def test_a_failed_start_is_told() -> None:
    engine = FakeEngine()
    engine.start_error = RuntimeError("no worker")
    assert drive_lifespan(engine) == ["lifespan.startup.failed"]
