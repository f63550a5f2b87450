"""Legacy completions through the official SDK: every form of prompt, streamed and not."""

from __future__ import annotations

import pytest

from tests.e2e.sdk import TEXT, connect, played


def test_a_string(playback):
    with connect(playback) as client:
        answer = client.completions.create(model="default", prompt=played(TEXT))
        chunks = list(client.completions.create(model="default", prompt=played(TEXT), stream=True))
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == TEXT


def test_several_prompts_keep_their_order(playback):
    prompts = [played(text) for text in ("one", "two", "three")]
    with connect(playback) as client:
        answer = client.completions.create(model="default", prompt=prompts, n=2)
        chunks = list(client.completions.create(model="default", prompt=prompts, stream=True))
    assert [choice.text for choice in answer.choices] == ["one", "one", "two", "two", "three", "three"]
    assert [choice.index for choice in answer.choices] == list(range(6))
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == ["one", "two", "three"]


@pytest.mark.parametrize("many", [False, True])
def test_token_ids(playback, many):
    # The built-in tokenizer's ids are bytes.
    token_ids = list(played("ids").encode())
    with connect(playback) as client:
        prompt = [token_ids, token_ids] if many else token_ids
        answer = client.completions.create(model="default", prompt=prompt)
    assert [choice.text for choice in answer.choices] == ["ids"] * (2 if many else 1)
    assert answer.usage.prompt_tokens == len(token_ids) * (2 if many else 1)


def test_echo_puts_the_prompt_first(playback):
    with connect(playback) as client:
        answer = client.completions.create(model="default", prompt=played("hi"), echo=True)
    assert answer.choices[0].text == played("hi") + "hi"


def test_logprobs_line_up_with_the_text(playback):
    with connect(playback) as client:
        answer = client.completions.create(model="default", prompt=played("hey"), logprobs=1, max_tokens=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["h", "e", "y"]
    assert logprobs.token_logprobs == [0.0] * 3
    assert [b - a for a, b in zip(logprobs.text_offset, logprobs.text_offset[1:], strict=False)] == [1, 1]
