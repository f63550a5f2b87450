"""The application around the handlers: routes, bodies, ids, keys, CORS, errors, health, cancelling."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from mlxd.api.errors import error_response
from mlxd.api.served_model import ServedModel
from mlxd.config import ChatConfig, ModelConfig
from mlxd.errors import (
    ConfigError,
    NotReadyError,
    OverloadedError,
    RateLimitError,
)
from tests.unit.api.fakes import (
    BOS,
    MAX_MODEL_LEN,
    NOW,
    FakeEngine,
    call,
    client,
    encode,
    make_app,
)

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
KEYS = {"limits": {"api_keys": [{"name": "a", "key": "secret-a"}, {"name": "b", "key": "secret-b"}]}}


def error_of(response: Any) -> dict[str, Any]:
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


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


# Bodies


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/x+json", None])
def test_json_content_types(content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    content = b'{"messages": [{"role": "user", "content": "Hi"}]}'
    assert call(make_app(FakeEngine()), "POST", CHAT, content=content, headers=headers).status_code == 200


def test_other_content_types_are_415() -> None:
    response = call(
        make_app(FakeEngine()), "POST", CHAT, content=b"{}", headers={"content-type": "text/plain"}
    )
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


def test_large_bodies_are_413_declared_or_not() -> None:
    app = make_app(FakeEngine(), {"server": {"max_body_bytes": 10}})
    assert call(app, "POST", CHAT, content=b"x" * 11).status_code == 413

    async def chunks() -> Any:
        yield b"x" * 6
        yield b"x" * 6

    response = call(app, "POST", CHAT, content=chunks())
    assert response.status_code == 413
    assert error_of(response)["type"] == "request_too_large"
    assert call(app, "POST", CHAT, content=b"", headers={"content-length": "9" * 30}).status_code == 413
    assert call(app, "POST", CHAT, content=b"", headers={"content-length": "-1"}).status_code == 400


def test_bodies_in_pieces_are_joined() -> None:
    async def chunks() -> Any:
        yield b'{"messages": [{"role": "user", '
        yield b'"content": "Hi"}]}'

    assert call(make_app(FakeEngine()), "POST", CHAT, content=chunks()).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'{"a": "\\ud800"}',
        b"[" * 5000,
        b"NaN",
        b'"text"',
        b"5",
        b"[]",
        b"null",
        b"{} x",
    ],
)
def test_what_is_no_json_object_is_400(body: bytes) -> None:
    response = call(make_app(FakeEngine()), "POST", CHAT, content=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["message"].startswith("the body") and error["param"] is None
    assert error["type"] == "invalid_request_error"


def test_depth_is_bounded() -> None:
    def nested(depth: int) -> dict[str, Any]:
        value: Any = "x"
        for _ in range(depth - 1):
            value = [value]
        return {**BODY, "metadata": value}

    app = make_app(FakeEngine(), {"server": {"max_json_depth": 8}})
    assert call(app, "POST", CHAT, json=nested(8)).status_code == 200
    response = call(app, "POST", CHAT, json=nested(9))
    assert response.status_code == 400 and "nested" in error_of(response)["message"]
    braces = {"messages": [{"role": "user", "content": "{[" * 100}]}
    assert call(app, "POST", CHAT, json=braces).status_code == 200


def test_unknown_fields_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(FakeEngine())
    with caplog.at_level(logging.WARNING, "mlxd.api"):
        for _ in range(2):
            fields = {**BODY, "context_management": {}, "beta": 1}
            assert call(app, "POST", CHAT, json=fields).status_code == 200
    assert sorted(r.getMessage() for r in caplog.records) == [
        "unknown request field 'beta' is ignored",
        "unknown request field 'context_management' is ignored",
    ]


def test_the_memory_of_unknown_fields_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(FakeEngine())
    with caplog.at_level(logging.WARNING, "mlxd.api"):
        call(app, "POST", CHAT, json={**BODY, **{f"f{i}": 1 for i in range(1000)}})
    assert len(caplog.records) == 256


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer secret-a"},
        {"authorization": "bearer  secret-b "},
        {"x-api-key": "secret-a"},
        {"authorization": "Basic xyz", "x-api-key": "secret-b"},
        # Agents send a key for somewhere else beside that of this server.
        {"authorization": "Bearer other", "x-api-key": "secret-b"},
        {"authorization": "Bearer secret-a", "x-api-key": "other"},
    ],
)
def test_every_key_opens_in_every_way(headers: dict[str, str]) -> None:
    assert call(make_app(FakeEngine(), KEYS), "POST", CHAT, json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer secret"},
        {"x-api-key": ""},
        {"authorization": "secret-a"},
        {"authorization": "Bearer other", "x-api-key": "another"},
    ],
)
def test_without_a_key_401(headers: dict[str, str]) -> None:
    response = call(make_app(FakeEngine(), KEYS), "POST", CHAT, json=BODY, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert "secret" not in error["message"]


def test_health_needs_no_key_and_status_does() -> None:
    app = make_app(FakeEngine(), KEYS)
    assert [call(app, "GET", p).status_code for p in ("/health", "/health/ready", "/metrics")] == [
        200,
        200,
        404,
    ]
    assert call(app, "GET", "/v1/status").status_code == 401
    assert call(app, "OPTIONS", CHAT).status_code == 204


def test_keys_from_files_and_environment(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    sources = [{"key_file": str(tmp_path / "key")}, {"key_env": "MY_KEY"}]
    app = make_app(FakeEngine(), {"limits": {"api_keys": sources}}, environ={"MY_KEY": "from-env"})
    for key in ("from-file", "from-env"):
        assert call(app, "GET", "/v1/models", headers={"x-api-key": key}).status_code == 200
    assert call(app, "GET", "/v1/models", headers={"x-api-key": "other"}).status_code == 401


@pytest.mark.parametrize(
    "source",
    [{}, {"key": "a", "key_env": "B"}, {"key": ""}, {"key_env": "UNSET"}, {"key_file": "/nowhere/key"}],
)
def test_keys_that_cannot_be_read_are_configuration_errors(source: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"limits\.api_keys\[0\]"):
        make_app(FakeEngine(), {"limits": {"api_keys": [source]}}, environ={})


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


# Health, models, tokens


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


def test_what_the_model_lacks_while_loading_is_not_ready() -> None:
    engine = FakeEngine()
    engine.files = engine.tokenizer = engine.info = None
    model = ServedModel(ModelConfig(path="x"), engine, created=0, chat=ChatConfig())  # type: ignore[arg-type]
    for name in ("files", "tokenizer", "fingerprint", "vocab_size"):
        with pytest.raises(NotReadyError):
            getattr(model, name)


def test_models() -> None:
    app = make_app(FakeEngine())
    expected = {
        "id": "org/tiny-model",
        "object": "model",
        "created": int(NOW),
        "owned_by": "vllm-mlx",
        "root": "org/tiny-model",
        "parent": None,
        "permission": [],
        "max_model_len": MAX_MODEL_LEN,
    }
    assert call(app, "GET", "/v1/models").json() == {"object": "list", "data": [expected]}
    assert call(app, "GET", "/v1/models/org/tiny-model").json() == expected
    assert call(app, "GET", "/v1/models/org%2Ftiny-model").json() == expected
    assert call(app, "GET", "/v1/models/default").json() == expected
    response = call(app, "GET", "/v1/models/other")
    assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


def test_served_names_and_owner() -> None:
    model = {"path": "org/x", "served_names": ["a", "b"], "owned_by": "me"}
    listed = call(make_app(FakeEngine(), {"model": model}), "GET", "/v1/models").json()["data"]
    assert [(m["id"], m["root"], m["owned_by"]) for m in listed] == [
        ("a", "org/x", "me"),
        ("b", "org/x", "me"),
    ]


def test_max_model_len_comes_from_the_files_before_the_worker_is_ready() -> None:
    engine = FakeEngine()
    engine.info = None
    assert call(make_app(engine), "GET", "/v1/models").json()["data"][0]["max_model_len"] == 8192


def test_tokenize_and_back() -> None:
    app = make_app(FakeEngine())
    answer = call(app, "POST", "/tokenize", json={"prompt": "Hé"}).json()
    assert answer == {
        "count": 4,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [BOS, *encode("Hé")],
        "token_strs": None,
    }
    back = call(app, "POST", "/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "<s>Hé"}
    answer = call(
        app,
        "POST",
        "/tokenize",
        json={"prompt": "Hi", "add_special_tokens": False, "return_token_strs": True},
    ).json()
    assert answer["token_strs"] == ["H", "i"]
    answer = call(app, "POST", "/tokenize", json=BODY).json()
    assert answer["tokens"] == encode("<|user|>Hi<|end|><|assistant|>")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", **BODY}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
    ],
)
def test_bad_token_requests(path: str, body: dict[str, Any]) -> None:
    response = call(make_app(FakeEngine()), "POST", path, json=body)
    assert response.status_code == 400
    error_of(response)


def test_many_tokens_are_decoded_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    async def to_thread(function: Any, *args: Any) -> Any:
        calls.append(function)
        return function(*args)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    response = call(make_app(FakeEngine()), "POST", "/detokenize", json={"tokens": encode("a") * 9000})
    assert response.json() == {"prompt": "a" * 9000} and len(calls) == 1


def test_status_is_the_engines() -> None:
    assert call(make_app(FakeEngine()), "GET", "/v1/status").json() == {"status": "running", "num_running": 0}


def test_fingerprint_changes_with_the_versions() -> None:
    engine = FakeEngine()
    app = make_app(engine)

    async def scenario() -> list[str]:
        async with client(app) as http:
            first = await http.post(CHAT, json=BODY)
            again = await http.post(CHAT, json=BODY)
            assert engine.info is not None
            engine.info = replace(engine.info, versions={"mlx": "2"})
            changed = await http.post(CHAT, json=BODY)
            return [r.json()["system_fingerprint"] for r in (first, again, changed)]

    first, again, changed = asyncio.run(scenario())
    assert first == again != changed


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
