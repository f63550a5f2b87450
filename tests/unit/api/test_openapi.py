"""The API's description: every route is in it, and real answers are what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mlxd.api import responses
from mlxd.api.anthropic import responses as anthropic
from mlxd.api.app import PUBLIC_PATHS, ROUTES
from mlxd.api.openai import responses as openai
from mlxd.api.openapi import OPERATIONS
from tests.unit.api.fakes import FakeEngine, call, make_app, says

KEYS = {"limits": {"api_keys": [{"name": "a", "key": "sesame"}]}}


def described(config: dict[str, Any] | None = None) -> dict[str, Any]:
    response = call(make_app(FakeEngine(), config), "GET", "/openapi.json")
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    return response.json()  # type: ignore[no-any-return]


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_every_route_is_described() -> None:
    document = described()
    found = {(method, path) for method, path, _ in operations(document)}
    assert found == {(method, path) for method, path, _ in ROUTES}
    assert found >= OPERATIONS.keys()
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert all(operation["summary"] for _, _, operation in operations(document))


def test_references_lead_somewhere() -> None:
    document = described()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                if key == "$ref":
                    yield item
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    names = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert names and names <= document["components"]["schemas"].keys()


def test_errors_are_in_the_dialect_of_the_path() -> None:
    paths = described()["paths"]

    def errors(path: str) -> dict[str, str]:
        return {
            status: answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            for status, answer in paths[path]["post"]["responses"].items()
            if status != "200"
        }

    assert set(errors("/v1/chat/completions").values()) == {"ErrorResponse"}
    assert set(errors("/v1/messages").values()) == {"MessageErrorResponse"}
    assert errors("/v1/messages").keys() - errors("/v1/chat/completions").keys() == {"529"}
    assert errors("/v1/chat/completions").keys() - errors("/v1/messages").keys() == {"502", "503"}


def test_keys_are_asked_for_where_there_are_some() -> None:
    assert not any("security" in operation for _, _, operation in operations(described()))
    for _, path, operation in operations(described(KEYS)):
        assert ("security" in operation) is (path not in PUBLIC_PATHS)
        assert ("401" in operation["responses"]) is (path not in PUBLIC_PATHS)


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
MESSAGE = {**CHAT, "model": "default", "max_tokens": 9}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = '<think>hm</think>Well, <tool_call>{"name": "f", "arguments": {}}</tool_call>'
MESSAGE_TOOL = {"name": "f", "input_schema": {}}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "shape"),
    [
        ("POST", "/v1/chat/completions", CHAT, 200, openai.ChatCompletion),
        ("POST", "/v1/chat/completions", {**CHAT, "tools": [TOOL]}, 200, openai.ChatCompletion),
        (
            "POST",
            "/v1/chat/completions",
            {**CHAT, "logprobs": True, "top_logprobs": 2},
            200,
            openai.ChatCompletion,
        ),
        ("POST", "/v1/chat/completions", {}, 400, openai.ErrorResponse),
        ("POST", "/v1/completions", {"prompt": "a"}, 200, openai.Completion),
        ("POST", "/v1/completions", {"prompt": "a", "logprobs": 2}, 200, openai.Completion),
        ("POST", "/v1/messages", MESSAGE, 200, anthropic.MessageResponse),
        ("POST", "/v1/messages", {**MESSAGE, "tools": [MESSAGE_TOOL]}, 200, anthropic.MessageResponse),
        ("POST", "/v1/messages", {}, 400, anthropic.MessageErrorResponse),
        ("POST", "/v1/messages/count_tokens", MESSAGE, 200, anthropic.TokenCount),
        ("GET", "/v1/models", None, 200, openai.ModelList),
        ("GET", "/v1/models/default", None, 200, openai.Model),
        ("GET", "/v1/models/nobody", None, 404, openai.ErrorResponse),
        ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}, 200, responses.Tokens),
        ("POST", "/tokenize", CHAT, 200, responses.Tokens),
        ("POST", "/detokenize", {"tokens": [1]}, 200, responses.DecodedPrompt),
        ("GET", "/health", None, 200, responses.Health),
        ("GET", "/health/ready", None, 200, responses.Health),
    ],
)
def test_answers_have_the_shapes(method: str, path: str, body: Any, status: int, shape: type) -> None:
    config = {"chat": {"reasoning_parser": "qwen3"}}
    response = call(make_app(FakeEngine(says(CALL)), config), method, path, json=body)
    assert response.status_code == status, response.text
    answer = msgspec.json.decode(response.content, type=shape)
    assert response.json().keys() <= msgspec.to_builtins(answer).keys()
