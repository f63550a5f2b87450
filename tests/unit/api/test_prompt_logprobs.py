"""Log-probabilities of prompts in both shapes: `echo` with `logprobs`, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from mlxd.engine.request import GenerationRequest, RequestOutput
from tests.unit.api.fakes import (
    BOS,
    END,
    TOKENIZER,
    FakeEngine,
    call,
    client,
    encode,
    make_app,
    says,
    sse_json,
)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def post(
    engine: FakeEngine, path: str = COMPLETIONS, config: dict[str, Any] | None = None, **fields: Any
) -> Any:
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}
    response = call(make_app(engine, config), "POST", path, json=given | fields)
    assert response.status_code == 200, response.text
    return sse_json(response.content) if fields.get("stream") else response.json()


def shown(token_ids: list[int], num_top: int) -> list[Any]:
    """What fakes.prompt_logprobs says of a prompt, in vLLM's shape."""
    entries: list[Any] = [None]
    for token in token_ids[1:]:
        ranked = {token: (-token / 64, token)}
        for rank in range(num_top):
            ranked.setdefault(rank, (-rank / 4, rank + 1))
        entries.append(
            {
                str(key): {"logprob": value, "rank": rank, "decoded_token": TOKENIZER.token_text(key)}
                for key, (value, rank) in ranked.items()
            }
        )
    return entries


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_with_logprobs_has_the_prompt_and_what_follows(max_tokens: int) -> None:
    engine = FakeEngine(says("!"))
    answer = post(engine, prompt="Hé", echo=True, logprobs=2, max_tokens=max_tokens)
    [choice] = answer["choices"]
    prompt = [BOS, *encode("Hé")]
    output = [*encode("!"), END] if max_tokens else []
    assert choice["text"] == ("Hé!" if max_tokens else "Hé")
    assert choice["finish_reason"] == ("stop" if max_tokens else "length")
    assert answer["usage"]["completion_tokens"] == len(output)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [TOKENIZER.token_text(i) for i in prompt + output]
    assert logprobs["token_logprobs"] == [None, *(-i / 64 for i in prompt[1:]), *(-i / 100 for i in output)]
    # The beginning-of-text token is not in the text; "é" is one character of two tokens.
    assert logprobs["text_offset"] == [0, 0, 1, 1] + [2, 3] * bool(output)
    assert logprobs["top_logprobs"][:2] == [None, {"!": 0.0, '"': -0.25, "H": -encode("H")[0] / 64}]
    assert all(len(top) >= 2 for top in logprobs["top_logprobs"][1:])


def test_echo_with_logprobs_zero_has_no_alternatives() -> None:
    logprobs = post(FakeEngine(), echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] is None
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 3 + len("Hello") + 1


def test_a_prompt_of_one_token() -> None:
    answer = post(FakeEngine(), prompt=[5], echo=True, logprobs=1, prompt_logprobs=1, max_tokens=0)
    [choice] = answer["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None] == choice["logprobs"]["top_logprobs"]
    assert choice["prompt_logprobs"] == [None]


def test_special_tokens_written_in_the_prompt_count_in_offsets() -> None:
    logprobs = post(FakeEngine(), prompt="<|end|>a", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert logprobs["text"] == "<|end|>a"
    assert logprobs["logprobs"]["text_offset"] == [0, 0, len("<|end|>")]


def test_the_first_choice_of_each_prompt_asks_for_all_of_them() -> None:
    def script(request: GenerationRequest) -> Any:
        return says("abcdef"[request.index])(request)

    engine = FakeEngine(script)
    prompts = [[5, 6], [7, 8, 9]]
    answer = post(engine, prompt=prompts, n=2, best_of=3, echo=True, logprobs=1)
    assert [request.prompt_logprobs for request in engine.submitted] == [1, -1, -1, 1, -1, -1]
    assert [choice["logprobs"]["token_logprobs"][1:-2] for choice in answer["choices"]] == [
        [-6 / 64],
        [-6 / 64],
        [-8 / 64, -9 / 64],
        [-8 / 64, -9 / 64],
    ]


@pytest.mark.parametrize("echo", [False, True])
def test_prompt_logprobs_are_vllms(echo: bool) -> None:
    engine = FakeEngine(says("!"))
    [choice] = post(engine, prompt_logprobs=2, echo=echo)["choices"]
    assert choice["prompt_logprobs"] == shown([BOS, *encode("Hi")], 2)
    assert choice["logprobs"] is None
    assert engine.submitted[0].prompt_logprobs == 2


def test_the_larger_of_two_wishes_is_computed_and_each_gets_its_own() -> None:
    engine = FakeEngine(says("!"))
    [choice] = post(engine, prompt_logprobs=1, echo=True, logprobs=3)["choices"]
    assert engine.submitted[0].prompt_logprobs == 3
    assert choice["prompt_logprobs"] == shown([BOS, *encode("Hi")], 1)
    assert len(choice["logprobs"]["top_logprobs"][1]) == 4


def test_prompt_logprobs_of_a_chat_are_beside_the_choices() -> None:
    prompt = encode("<|user|>Hi<|end|><|assistant|>")
    engine = FakeEngine(says("!"))
    answer = post(engine, CHAT, prompt_logprobs=2, n=2)
    assert answer["prompt_logprobs"] == shown(prompt, 2)
    assert [request.prompt_logprobs for request in engine.submitted] == [2, -1]
    assert "prompt_logprobs" not in post(FakeEngine(), CHAT)
    chunks = post(FakeEngine(says("!")), CHAT, prompt_logprobs=2, n=2, stream=True)
    [chunk] = [chunk for chunk in chunks if "prompt_logprobs" in chunk]
    assert chunk["prompt_logprobs"] == shown(prompt, 2)
    assert chunk["choices"][0]["delta"] == {"content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True, "logprobs": 2},
        {"echo": True, "logprobs": 0, "prompt_logprobs": 1},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": 1, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "max_tokens": 0},
        {"max_tokens": 0},
    ],
)
def test_streamed_equals_whole(fields: dict[str, Any]) -> None:
    """Also where the later choices speak before the first one of their prompt has."""

    def script(request: GenerationRequest) -> Any:
        # The fake engine hands out one output a turn, and with these a first choice has nothing to say yet.
        if request.index % 2 == 0:
            yield from [RequestOutput(request.index, "", []) for _ in range(4)]
        yield from says("abcd"[request.index])(request)

    asked = {"prompt": ["Hé", "Yo"], "n": 2, **fields}
    whole = post(FakeEngine(script), **asked)["choices"]
    chunks = post(FakeEngine(script), **asked, stream=True, stream_options={"include_usage": True})
    assert chunks.pop()["usage"]["prompt_tokens"] == 7
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [p["finish_reason"] for p in mine][-1] == choice["finish_reason"]
        given = [piece["logprobs"] for piece in mine if piece["logprobs"]]
        if choice["logprobs"] is None:
            assert not given
        else:
            for name, values in choice["logprobs"].items():
                assert [v for piece in given for v in piece[name] or []] == (values or [])
        told = [piece["prompt_logprobs"] for piece in mine if "prompt_logprobs" in piece]
        assert told == ([choice["prompt_logprobs"]] if "prompt_logprobs" in choice else [])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_answer_has_a_largest_size(path: str) -> None:
    config = {"limits": {"max_prompt_logprobs": 12}}
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": [5, 6, 7]}
    body = {**given, "prompt_logprobs": 4}
    response = call(make_app(FakeEngine(), config), "POST", path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "prompt_logprobs" and "12" in error["message"]
    if path == COMPLETIONS:
        assert post(FakeEngine(), config=config, prompt=[5, 6, 7], prompt_logprobs=3)
        body = {**given, "echo": True, "logprobs": 1, "n": 3}
        response = call(make_app(FakeEngine(), config), "POST", path, json=body)
        assert response.json()["error"]["param"] == "logprobs"


def test_long_ones_are_written_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    token_text = type(TOKENIZER).token_text

    def spy(self: Any, token_id: int) -> str:
        threads.append(threading.current_thread() is threading.main_thread())
        return token_text(self, token_id)

    monkeypatch.setattr(type(TOKENIZER), "token_text", spy)

    async def main(stream: bool, length: int) -> None:
        async with client(make_app(FakeEngine(says("!")))) as http:
            body = {"prompt": [5] * length, "prompt_logprobs": 1, "stream": stream}
            assert (await http.post(COMPLETIONS, json=body)).status_code == 200

    for stream in (False, True):
        for length in (10, 1000):
            threads.clear()
            asyncio.run(main(stream, length))
            assert set(threads) == {length == 10}


def test_a_chat_echoes_the_message_that_it_continues() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "Well"}]}]
    fields = {"messages": messages, "echo": True, "continue_final_message": True}
    answer = post(FakeEngine(says(", yes")), CHAT, **fields)
    assert answer["choices"][0]["message"]["content"] == "Well, yes"
    chunks = post(FakeEngine(says(", yes")), CHAT, **fields, stream=True)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Well, yes"
    assert post(FakeEngine(says("yes")), CHAT, echo=True)["choices"][0]["message"]["content"] == "yes"
