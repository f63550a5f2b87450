"""POST /v1/chat/completions: every field honoured or refused, whole answers and streams."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mlxd.api.openai.schema import ChatCompletionRequest
from mlxd.engine.request import FinishReason
from mlxd.text.tokenizer import Tokenizer
from tests.unit.api.fakes import (
    NOW,
    TOKENIZER,
    FakeEngine,
    call,
    encode,
    make_app,
    says,
    sse_json,
    with_defaults,
)

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


def ask(engine: FakeEngine, config: dict[str, Any] | None = None, **fields: Any) -> Any:
    body, headers = {"messages": USER, **fields}, {"x-request-id": "r"}
    response = call(make_app(engine, config), "POST", PATH, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(**fields: Any) -> dict[str, Any]:
    response = call(make_app(FakeEngine()), "POST", PATH, json={"messages": USER, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_whole_answer_has_openais_shape() -> None:
    answer = ask(FakeEngine(says("Héllo")))
    assert answer == {
        "id": f"chatcmpl-{1:032x}",
        "object": "chat.completion",
        "created": int(NOW),
        "model": "org/tiny-model",
        "system_fingerprint": answer["system_fingerprint"],
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Héllo",
                    "refusal": None,
                    "reasoning": None,
                    "reasoning_content": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(encode("<|user|>Hi<|end|><|assistant|>")),
            "completion_tokens": 7,
            "total_tokens": len(encode("<|user|>Hi<|end|><|assistant|>")) + 7,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert answer["system_fingerprint"].startswith("fp_")


def test_stream_has_role_deltas_finish_usage_done() -> None:
    engine = FakeEngine(says('a"é\n'))
    response = call(
        make_app(engine),
        "POST",
        PATH,
        json={"messages": USER, "stream": True, "stream_options": {"include_usage": True}},
    )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    chunks = sse_json(response.content)
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        (f"chatcmpl-{1:032x}", int(NOW), "org/tiny-model", "chat.completion.chunk")
    }
    *middle, usage = chunks
    assert all(c["usage"] is None for c in middle)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    choices = [c["choices"][0] for c in middle]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["delta"].get("content") for c in choices[1:-1]] == ["a", '"', "é", "\n"]
    assert choices[-1] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * 5


@pytest.mark.parametrize("logprobs", [False, True])
def test_every_chunk_may_tell_the_usage_so_far(logprobs: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": USER, "stream": True, "stream_options": options, "logprobs": logprobs}
    *middle, last = sse_json(call(make_app(FakeEngine(says("ab"))), "POST", PATH, json=body).content)
    assert middle[0]["usage"] is None  # the role: nothing is computed yet
    told = [chunk["usage"] for chunk in middle[1:]]
    # With log-probabilities the last token has a chunk of its own before the finish_reason.
    assert [usage["completion_tokens"] for usage in told] == ([1, 2, 3, 3] if logprobs else [1, 2, 3])
    assert told[-1] == last["usage"]


def test_stream_without_usage_says_nothing_of_it() -> None:
    response = call(make_app(FakeEngine()), "POST", PATH, json={"messages": USER, "stream": True})
    assert all("usage" not in chunk for chunk in sse_json(response.content))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 0}, {"top_p": 1.0, "top_k": 1}),
        ({"top_k": 7}, {"top_k": 7}),
        ({"top_k": 7.0}, {"top_k": 7}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"logit_bias": {"5": -100, "299": 3}}, {"logit_bias": {5: -100.0, 299: 3.0}}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"logprobs": False}, {"logprobs": -1}),
        ({"best_of": 2}, {"logprobs": 0}),
    ],
)
def test_sampling_fields_reach_the_engine(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    engine = FakeEngine()
    ask(engine, **fields)
    sampling = engine.submitted[0].sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"max_tokens": 32768, "seed": None, "stop": (), "timeout_seconds": 300.0, "index": 0}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "yz"]}, {"stop": ("x", "yz")}),
        ({"stop": []}, {"stop": ()}),
        ({"stop_token_ids": [1, 2.0]}, {"stop_token_ids": (1, 2)}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"priority": -3}, {"priority": -3}),
        ({"timeout": 2.5}, {"timeout_seconds": 2.5}),
        ({"timeout": 1e9}, {"timeout_seconds": 300.0}),
        ({"stream": True}, {"stream_interval": 1}),
    ],
)
def test_request_fields_reach_the_engine(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    engine = FakeEngine()
    response = call(make_app(engine), "POST", PATH, json={"messages": USER, **fields})
    assert response.status_code == 200, response.text
    assert {name: getattr(engine.submitted[0], name) for name in expected} == expected


def test_null_is_absent_for_every_optional_field() -> None:
    names = set(ChatCompletionRequest.__struct_fields__) - {"messages"}
    engine = FakeEngine()
    ask(engine, **dict.fromkeys(names))
    plain = FakeEngine()
    ask(plain)
    assert engine.submitted == plain.submitted


def test_defaults_chain() -> None:
    files = with_defaults(
        default_temperature=0.3,
        default_top_p=0.8,
        default_top_k=9,
        default_min_p=0.05,
        default_repetition_penalty=1.2,
    )
    engine = FakeEngine(files=files)
    ask(engine)
    server = {"defaults": {"temperature": 0.5, "top_p": 0.6, "max_tokens": 11, "stream_interval": 4}}
    ask(engine, server)
    ask(engine, server, temperature=0.7, top_p=0.9, top_k=0, min_p=0, repetition_penalty=1, max_tokens=3)
    seen = [
        (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty)
        for s in (request.sampling for request in engine.submitted)
    ]
    assert seen == [(0.3, 0.8, 9, 0.05, 1.2), (0.5, 0.6, 9, 0.05, 1.2), (0.7, 0.9, 0, 0.0, 1.0)]
    assert [request.max_tokens for request in engine.submitted] == [32768, 11, 3]
    plain = FakeEngine()
    ask(plain)
    assert (plain.submitted[0].sampling.temperature, plain.submitted[0].sampling.top_p) == (1.0, 1.0)


def test_n_choices_have_their_own_seed_and_id() -> None:
    engine = FakeEngine(lambda request: says(f"choice {request.index}")(request))
    answer = ask(engine, n=3, seed=41)
    assert [c["message"]["content"] for c in answer["choices"]] == ["choice 0", "choice 1", "choice 2"]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert [r.seed for r in engine.submitted] == [41, 42, 43]
    assert [r.request_id for r in engine.submitted] == [f"{answer['id']}-{i}" for i in range(3)]
    prompt_tokens = len(engine.submitted[0].prompt_token_ids)
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["usage"]["completion_tokens"] == 3 * len("choice 0") + 3


def test_streamed_choices_stay_apart() -> None:
    engine = FakeEngine(lambda request: says("abc"[request.index] * 3)(request))
    response = call(make_app(engine), "POST", PATH, json={"messages": USER, "stream": True, "n": 3})
    texts = {0: "", 1: "", 2: ""}
    for chunk in sse_json(response.content):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "aaa", 1: "bbb", 2: "ccc"}


def test_best_of_answers_with_the_likeliest() -> None:
    # The fake's tokens are the less likely, the higher their id.
    engine = FakeEngine(lambda request: says("zzbaz"[request.index])(request))
    answer = ask(engine, n=2, best_of=5)
    assert [c["message"]["content"] for c in answer["choices"]] == ["a", "b"]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 10


def test_logprobs_carry_tokens_and_bytes_and_leave_out_the_end_token() -> None:
    answer = ask(FakeEngine(says("é")), logprobs=True, top_logprobs=2)
    first, second = encode("é")
    content = answer["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in content] == [[0xC3], [0xA9]]
    assert [token["logprob"] for token in content] == [-first / 100, -second / 100]
    assert [len(token["top_logprobs"]) for token in content] == [2, 2]
    assert content[0]["top_logprobs"][1]["token"] == TOKENIZER.token_text(first + 1)


def test_streamed_logprobs_equal_whole_ones() -> None:
    fields = {"messages": USER, "logprobs": True, "top_logprobs": 1}
    whole = ask(FakeEngine(says("aé")), **fields)
    response = call(make_app(FakeEngine(says("aé"))), "POST", PATH, json={**fields, "stream": True})
    choices = [chunk["choices"][0] for chunk in sse_json(response.content)]
    content = [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
    assert content == whole["choices"][0]["logprobs"]["content"]
    assert "".join(c["delta"].get("content", "") for c in choices) == "aé"


def test_stop_reasons_are_told() -> None:
    answer = ask(FakeEngine(says("ab", stop_reason="END")), stop="END")
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("stop", "END")
    answer = ask(FakeEngine(says("ab", finish=FinishReason.LENGTH)), max_tokens=2, logprobs=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["logprobs"]["content"]) == 2


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "<|user|>Hi<|end|><|assistant|>"),
        ({"add_generation_prompt": False}, "<|user|>Hi<|end|>"),
        ({"enable_thinking": False}, "<|user|>Hi<|end|><|assistant|>quick:"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<|user|>Hi<|end|><|assistant|>quick:"),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *USER]},
            "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            "<|user|>Hi<|end|><|assistant|>",
        ),
        (
            {"messages": [*USER, {"role": "assistant", "content": "Oh"}], "continue_final_message": True},
            "<|user|>Hi<|end|><|assistant|>Oh",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
                    {"role": "tool", "tool_call_id": "c", "content": "42"},
                ]
            },
            "<|assistant|>f{}<|end|><|tool|>42<|end|><|assistant|>",
        ),
        (
            {
                "messages": [
                    {"role": "user", "name": "Ann", "content": "Hi"},
                    {"role": "assistant", "content": "Oh", "reasoning": "Hm."},
                ]
            },
            "<|user|>Ann: Hi<|end|><|assistant|>(Hm.)Oh<|end|><|assistant|>",
        ),
    ],
)
def test_prompts(fields: dict[str, Any], prompt: str) -> None:
    engine = FakeEngine()
    ask(engine, **fields)
    assert engine.submitted[0].prompt_token_ids == encode(prompt)


def test_add_special_tokens_is_the_clients_choice() -> None:
    engine = FakeEngine()
    ask(engine, add_special_tokens=True)
    assert engine.submitted[0].prompt_token_ids == TOKENIZER.encode("<|user|>Hi<|end|><|assistant|>")


def test_long_prompts_are_tokenised_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop: list[bool] = []
    encode_batch = Tokenizer.encode_batch

    def watched(*args: Any) -> list[list[int]]:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return encode_batch(*args)

    monkeypatch.setattr(Tokenizer, "encode_batch", watched)
    engine = FakeEngine()
    response = call(
        make_app(engine), "POST", PATH, json={"messages": [{"role": "user", "content": "x" * 9000}]}
    )
    assert on_loop == [False]
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search"}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"reasoning_effort": "enormous"},
        {"thinking_token_budget": 5},
        {"thinking_token_budget": -2},
        {"prompt_logprobs": 21},
        {"suffix": "x"},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"web_search_options": {}},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": "0.5"},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": -1},
        {"n": 0},
        {"n": 129},
        {"best_of": 129},
        {"best_of": 1, "n": 2},
        {"best_of": 2, "stream": True},
        {"max_tokens": 0},
        {"max_completion_tokens": -1},
        {"min_tokens": 6, "max_tokens": 5},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": ["a"] * 17},
        {"stop": 5},
        {"stop_token_ids": [300]},
        {"stop_token_ids": [-1]},
        {"logit_bias": {"300": 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"²": 1}},
        {"logit_bias": {"1": 101}},
        {"logprobs": 1},
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": 2},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0},
        {"seed": 2**64},
        {"seed": 1.5},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": 1}, "stream": True},
        {"timeout": 0},
        {"priority": "high"},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": 5},
        {"messages": []},
        {"messages": [], "echo": True},
        {"messages": None},
        {"messages": "Hi"},
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any]) -> None:
    error = refusal(**fields)
    assert error["param"].split(".")[0].split("[")[0] in fields
    assert error["param"] in error["message"]


@pytest.mark.parametrize(
    ("path", "prompt"), [(PATH, {"messages": USER}), ("/v1/completions", {"prompt": "a"})]
)
def test_more_choices_than_the_queue_ever_takes_are_no_overload(path: str, prompt: dict[str, Any]) -> None:
    app = make_app(FakeEngine(), {"scheduler": {"max_queue": 2}})
    response = call(app, "POST", path, json={**prompt, "n": 3})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "n: at most 2, got 3"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": False},
        {"reasoning_effort": "high"},
        {"thinking_token_budget": -1},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"echo": False},
        {"suffix": ""},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {
            "verbosity": "medium",
            "safety_identifier": "s",
            "prompt_cache_key": "k",
            "prediction": {"type": "content"},
        },
        {"stream_options": {"include_obfuscation": False}, "stream": True},
        {
            "use_beam_search": False,
            "length_penalty": 1.0,
            "bad_words": [],
            "include_stop_str_in_output": False,
        },
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    response = call(make_app(FakeEngine()), "POST", PATH, json={"messages": USER, **fields})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]},
            "messages[0].tool_calls",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0].function.name"),
    ],
)
def test_bad_messages_are_refused_by_place(message: dict[str, Any], param: str) -> None:
    assert refusal(messages=[message])["param"] == param


def test_a_model_without_template_says_so() -> None:
    engine = FakeEngine(files=with_defaults(chat_templates={}))
    response = call(make_app(engine), "POST", PATH, json={"messages": USER})
    assert response.status_code == 400
    assert "chat template" in response.json()["error"]["message"]


def test_a_broken_template_is_our_error() -> None:
    engine = FakeEngine(files=with_defaults(chat_templates={"default": "{% if %}"}))
    response = call(make_app(engine), "POST", PATH, json={"messages": USER})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


def test_models_answer_to_their_names() -> None:
    config = {"model": {"path": "org/tiny", "served_names": ("nice", "other")}}
    for name in ("nice", "other", "org/tiny", "default"):
        assert ask(FakeEngine(), config, model=name)["model"] == "nice"
    response = call(make_app(FakeEngine(), config), "POST", PATH, json={"messages": USER, "model": "gpt-4"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "not_found_error")


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"a": "\\ud800"}', "no JSON"])
def test_arguments_in_the_history_may_be_anything(arguments: str) -> None:
    call_ = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call_]}]
    response = call(make_app(FakeEngine()), "POST", PATH, json={"messages": messages})
    assert response.status_code in (200, 400), response.text
