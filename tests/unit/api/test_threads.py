"""What is large is done in threads, or in pieces, so that the event loop goes on; what is small is not."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mlxd.api import threads
from mlxd.api.body import BodyDecoder
from mlxd.api.generation import INLINE_OUTPUTS
from mlxd.api.openai.completions import _Answer
from mlxd.api.tokenize import ITEMS_AT_ONCE
from mlxd.chat.format import ChatFormat
from mlxd.text.tokenizer import Tokenizer
from tests.unit.api.fakes import FakeEngine, call, make_app

Spy = Callable[[type, str], list[bool]]


@pytest.fixture
def on_loop(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Watches a method: whether each of its calls was on the event loop's thread."""

    def spy(owner: type, name: str) -> list[bool]:
        calls: list[bool] = []
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(threading.current_thread() is threading.main_thread())
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
        return calls

    return spy


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": "Hi"} for i in range(count)]


@pytest.mark.parametrize("count", [1, threads.MANY_MESSAGES + 1])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_long_conversation_is_rendered_in_a_thread(on_loop: Spy, path: str, count: int) -> None:
    calls = on_loop(ChatFormat, "render")
    body = {"model": "default", "max_tokens": 4, "messages": turns(count)}
    response = call(make_app(FakeEngine()), "POST", path, json=body)
    assert response.status_code == 200
    assert calls == [count == 1]


@pytest.mark.parametrize("count", [1, INLINE_OUTPUTS + 1])
def test_an_answer_of_many_choices_is_written_in_a_thread(on_loop: Spy, count: int) -> None:
    calls = on_loop(_Answer, "whole")
    body = {"prompt": [[5]] * count, "max_tokens": 1}
    response = call(make_app(FakeEngine()), "POST", "/v1/completions", json=body)
    assert len(response.json()["choices"]) == count
    assert calls == [count == 1]


@pytest.mark.parametrize("size", [10, threads.LARGE_BODY_BYTES])
def test_a_large_body_is_decoded_in_a_thread(on_loop: Spy, size: int) -> None:
    calls = on_loop(BodyDecoder, "decode")
    response = call(
        make_app(FakeEngine()), "POST", "/v1/completions", json={"prompt": [5], "user": "x" * size}
    )
    assert response.status_code == 200
    assert calls == [size == 10]


@pytest.mark.parametrize("size", [10, ITEMS_AT_ONCE + 10])
def test_many_tokens_are_written_and_read_in_a_thread(on_loop: Spy, size: int) -> None:
    written, read = on_loop(Tokenizer, "token_text"), on_loop(Tokenizer, "decode")
    app = make_app(FakeEngine())
    answer = call(app, "POST", "/tokenize", json={"prompt": "x" * size, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == size + 1
    assert answer["token_strs"] == ["<s>", *"x" * size]
    assert set(written) == {size == 10}
    assert call(app, "POST", "/detokenize", json={"tokens": answer["tokens"]}).status_code == 200
    assert read == [size == 10]


def test_an_error_in_a_thread_is_answered_as_ever() -> None:
    messages = [*turns(threads.MANY_MESSAGES), {"role": "nobody", "content": "x"}]
    response = call(make_app(FakeEngine()), "POST", "/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400 and "nobody" in response.json()["error"]["message"]
    body = b'{"prompt": "' + b"x" * threads.LARGE_BODY_BYTES
    response = call(make_app(FakeEngine()), "POST", "/v1/completions", content=body)
    assert response.status_code == 400 and "not valid JSON" in response.json()["error"]["message"]


def test_threads_give_way_soon() -> None:
    before = sys.getswitchinterval()
    try:
        threads.switch_often()
        assert sys.getswitchinterval() == pytest.approx(threads.SWITCH_SECONDS)
    finally:
        sys.setswitchinterval(before)


def test_short_work_stays_on_the_loop() -> None:
    async def main() -> None:
        here = threading.get_ident()
        assert await threads.off_loop_if(False, threading.get_ident) == here
        assert await threads.off_loop_if(True, threading.get_ident) != here

    asyncio.run(main())
