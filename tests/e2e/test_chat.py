"""Chat completions through the official SDK against a real server that plays given texts."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from bench.server import ServerProcess
from tests.e2e.sdk import TEXT, connect, played, user

NUM_TOKENS = len(TEXT.encode()) + 1
"""Playback's tokens are bytes, and one ends the turn."""


def ask(server: ServerProcess, text: str = TEXT, **fields: Any) -> Any:
    with connect(server) as client:
        return client.chat.completions.create(model="default", messages=user(played(text)), **fields)


def ask_streamed(server: ServerProcess, text: str = TEXT, **fields: Any) -> list[ChatCompletionChunk]:
    with connect(server) as client:
        return list(
            client.chat.completions.create(
                model="default", messages=user(played(text)), stream=True, **fields
            )
        )


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def finish_reasons(chunks: list[ChatCompletionChunk]) -> list[str]:
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


def test_a_whole_answer(playback):
    answer = ask(playback)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == NUM_TOKENS
    assert answer.usage.prompt_tokens > len(TEXT.encode())
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + NUM_TOKENS


def test_a_stream_says_the_same_in_the_right_order(playback):
    chunks = ask_streamed(playback, stream_options={"include_usage": True})
    assert text_of(chunks) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert finish_reasons(chunks) == ["stop"]
    *others, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == NUM_TOKENS
    assert all(chunk.usage is None for chunk in others)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_usage_is_not_sent_unasked(playback):
    assert all(chunk.choices and chunk.usage is None for chunk in ask_streamed(playback))


def test_a_stream_comes_in_many_chunks(playback):
    assert len(ask_streamed(playback, "x" * 200)) > 100


@pytest.mark.parametrize("text", ["", "a", "🙂", "<|im_end|>x", "\u2028\x7f\x00", "data: [DONE]\n\n"])
def test_awkward_texts_arrive_as_they_are(playback, text):
    # The end-of-turn token written out in a message is its text, and the text is what ends the play.
    expected = text.partition("<|im_end|>")[0]
    assert ask(playback, text).choices[0].message.content == expected
    assert text_of(ask_streamed(playback, text)) == expected


def test_several_choices(playback):
    answer = ask(playback, n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(i, TEXT) for i in range(3)]
    assert answer.usage.completion_tokens == 3 * NUM_TOKENS
    chunks = ask_streamed(playback, n=3)
    assert [text_of(chunks, index) for index in range(3)] == [TEXT] * 3
    assert finish_reasons(chunks) == ["stop"] * 3


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("STOP", "go on, S, ST, STO, then "),
        (["nothing", "STOP"], "go on, S, ST, STO, then "),
        (["TOP", "STOP and more"], "go on, S, ST, STO, then S"),
    ],
)
def test_stop_strings_are_cut_across_tokens(playback, stop, expected):
    text = "go on, S, ST, STO, then STOP and more"
    answer = ask(playback, text, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    chunks = ask_streamed(playback, text, stop=stop)
    assert text_of(chunks) == expected


def test_max_tokens_ends_with_length(playback):
    answer = ask(playback, "abcdefgh", max_tokens=3)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("abc", "length")
    assert answer.usage.completion_tokens == 3
    chunks = ask_streamed(playback, "abcdefgh", max_completion_tokens=3)
    assert (text_of(chunks), finish_reasons(chunks)) == ("abc", ["length"])


def test_ignore_eos_goes_on_to_max_tokens(playback):
    answer = ask(playback, "ab", max_tokens=7, extra_body={"ignore_eos": True})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 7)


def test_logprobs_cover_every_token(playback):
    answer = ask(playback, "añb", logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content[:4]) == "añb".encode()
    assert all(entry.logprob == 0.0 and len(entry.top_logprobs) >= 1 for entry in content)
    chunks = ask_streamed(playback, "añb", logprobs=True, top_logprobs=2)
    streamed = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content or []
    ]
    assert streamed == content


def test_a_conversation_plays_its_last_message(playback):
    messages = [
        {"role": "system", "content": played("system")},
        {"role": "user", "content": played("first")},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": played("parts")}]},
    ]
    with connect(playback) as client:
        answer = client.chat.completions.create(model="default", messages=messages)
    assert answer.choices[0].message.content == "parts"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_p": 1.5}, "top_p"),
        ({"extra_body": {"top_k": "many"}}, "top_k"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_a_400_that_names_it(playback, fields, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(playback, stream=stream, **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_beyond_the_context_is_a_400_with_the_numbers(start):
    server = start({"worker": {"backend": "playback"}, "model": {"max_model_len": 128}})
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, "x" * 200)
    assert caught.value.code == "context_length_exceeded"
    assert "128" in caught.value.message


def test_an_unknown_model_is_not_found(playback):
    with connect(playback) as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=user("hi"))
    assert caught.value.code == "model_not_found"


def test_a_key_is_needed_where_one_is_set(start):
    server = start({"worker": {"backend": "playback"}, "limits": {"api_keys": [{"key": "sesame"}]}})
    with connect(server, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with connect(server, api_key="sesame") as client:
        answer = client.chat.completions.create(model="default", messages=user(played("in")))
    assert answer.choices[0].message.content == "in"


def test_models(start):
    server = start({"worker": {"backend": "playback"}, "model": {"served_names": ["org/name", "short"]}})
    with connect(server) as client:
        ids = [model.id for model in client.models.list()]
        assert ids[0] == "org/name"
        assert client.models.retrieve("org/name").owned_by == "vllm-mlx"
        for name in ("org/name", "short", "default"):
            answer = client.chat.completions.create(model=name, messages=user(played(name)))
            assert (answer.model, answer.choices[0].message.content) == ("org/name", name)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")
