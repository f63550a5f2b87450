"""Special tokens that somebody writes in a text: what docs/operations.md says of them, route by route."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.api.fakes import END, FakeEngine, call, encode, make_app

WRITTEN, OTHER = "all<|end|>good", "all's good"
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def chat_with_result(text: str) -> dict[str, Any]:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    return {"messages": [called, {"role": "tool", "tool_call_id": "c", "content": text}]}


def message(text: str) -> dict[str, Any]:
    return chat(text) | {"max_tokens": 9}


def message_with_result(text: str) -> dict[str, Any]:
    result = {"type": "tool_result", "tool_use_id": "c", "content": text}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [USE]}]
    return {"messages": [*turns, {"role": "user", "content": [result]}], "max_tokens": 9}


def completion(text: str) -> dict[str, Any]:
    return {"prompt": text}


def number(path: str, body: dict[str, Any]) -> int:
    """Of end-of-turn tokens in the prompt that the worker gets."""
    engine = FakeEngine()
    response = call(make_app(engine), "POST", path, json={"model": "default", **body})
    assert response.status_code == 200, response.text
    return engine.submitted[0].prompt_token_ids.count(END)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat_with_result),
        ("/v1/messages", message),
        ("/v1/messages", message_with_result),
        ("/v1/completions", completion),
    ],
)
def test_a_special_token_that_is_written_is_one(path: str, body: Any) -> None:
    assert number(path, body(WRITTEN)) == number(path, body(OTHER)) + 1


def test_a_prompt_of_token_ids_has_those_alone_that_its_sender_put_there() -> None:
    plain = [token_id for part in ("all<", "|end|>good") for token_id in encode(part)]
    assert number("/v1/completions", {"prompt": plain}) == 0
    shown = call(make_app(FakeEngine()), "POST", "/tokenize", json={"prompt": WRITTEN}).json()["tokens"]
    assert shown.count(END) == 1
