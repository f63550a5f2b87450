"""Every field of OpenAI's two requests changes what it should, or is a 400 that names it; none is ignored.

The table has a row for each field that the schemas know, so a new one cannot be forgotten.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mlxd.api.openai.schema import ChatCompletionRequest, CompletionRequest
from tests.unit.api.fakes import TEMPLATE, FakeEngine, call, make_app, says, with_defaults

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}]},
    COMPLETIONS: {"prompt": "Hi"},
}
FILES = with_defaults(chat_templates={"default": TEMPLATE + "{{ reasoning_effort }}{{ shade }}"})
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}

NOTHING = "nothing"
"""informative: must be taken, and change nothing"""
REFUSED = "refused"
PROMPT = "prompt_token_ids"
GRAMMAR = "sampling.grammar"
ANSWER = "answer"
COUNT = "number of sequences"

# field: value, what it changes, and the other fields it needs
Row = tuple[Any, str, dict[str, Any]]
BOTH: dict[str, Row] = {
    "model": ("nobody", REFUSED, {}),
    "max_tokens": (7, "max_tokens", {}),
    "max_completion_tokens": (7, "max_tokens", {"max_tokens": 9}),
    "temperature": (0.3, "sampling.temperature", {}),
    "top_p": (0.5, "sampling.top_p", {}),
    "top_k": (5, "sampling.top_k", {}),
    "min_p": (0.1, "sampling.min_p", {}),
    "n": (2, COUNT, {}),
    "best_of": (3, COUNT, {}),
    "seed": (5, "seed", {}),
    "stop": ("l", "stop", {}),
    "stop_token_ids": ([5], "stop_token_ids", {}),
    "presence_penalty": (0.5, "sampling.presence_penalty", {}),
    "frequency_penalty": (0.5, "sampling.frequency_penalty", {}),
    "repetition_penalty": (1.5, "sampling.repetition_penalty", {}),
    "logit_bias": ({"5": 2.0}, "sampling.logit_bias", {}),
    "stream": (True, ANSWER, {}),
    "stream_options": ({"include_usage": True}, ANSWER, {"stream": True}),
    "ignore_eos": (True, "ignore_eos", {}),
    "min_tokens": (3, "sampling.min_tokens", {}),
    "skip_special_tokens": (False, "skip_special_tokens", {}),
    "timeout": (2.5, "timeout_seconds", {}),
    "priority": (3, "priority", {}),
    "cache_salt": ("mine", "cache_salt", {}),
    "user": ("u", NOTHING, {}),
    "metadata": ({"a": 1}, NOTHING, {}),
    "store": (True, NOTHING, {}),
    "service_tier": ("flex", NOTHING, {}),
    "safety_identifier": ("s", NOTHING, {}),
    "prompt_cache_key": ("k", NOTHING, {}),
    "prompt_cache_retention": ("24h", NOTHING, {}),
    "prompt_cache_options": ({"mode": "explicit"}, NOTHING, {}),
    "prediction": ({"type": "content", "content": "x"}, NOTHING, {}),
    "response_format": ({"type": "json_object"}, GRAMMAR, {}),
    "structured_outputs": ({"json": SCHEMA}, GRAMMAR, {}),
    "guided_json": (SCHEMA, GRAMMAR, {}),
    "guided_regex": ("[a-z]+", GRAMMAR, {}),
    "guided_choice": (["a", "b"], GRAMMAR, {}),
    "guided_grammar": ('start: "a"', GRAMMAR, {}),
    "echo": (True, ANSWER, {}),
    "suffix": ("x", REFUSED, {}),
    "prompt_logprobs": (2, "prompt_logprobs", {}),
    "thinking_token_budget": (0, REFUSED, {}),
    "allowed_token_ids": ([5], REFUSED, {}),
    "bad_words": (["a"], REFUSED, {}),
    "include_stop_str_in_output": (True, REFUSED, {}),
    "length_penalty": (0.8, REFUSED, {}),
    "logits_processors": (["a.b"], REFUSED, {}),
    "return_token_ids": (True, REFUSED, {}),
    "return_tokens_as_token_ids": (True, REFUSED, {}),
    "truncate_prompt_tokens": (-1, REFUSED, {}),
    "use_beam_search": (True, REFUSED, {}),
}
OF_CHAT: dict[str, Row] = {
    "add_special_tokens": (True, PROMPT, {}),
    "reasoning_effort": ("high", PROMPT, {}),
    "messages": ([{"role": "user", "content": "Yo"}], PROMPT, {}),
    "logprobs": (True, "sampling.logprobs", {}),
    "top_logprobs": (3, "sampling.logprobs", {"logprobs": True}),
    "add_generation_prompt": (False, PROMPT, {}),
    "continue_final_message": (True, PROMPT, {}),
    "chat_template_kwargs": ({"shade": "blue"}, PROMPT, {}),
    "enable_thinking": (False, PROMPT, {}),
    "tools": ([TOOL], PROMPT, {}),
    "tool_choice": ("required", GRAMMAR, {"tools": [TOOL]}),
    "parallel_tool_calls": (False, GRAMMAR, {"tools": [TOOL], "tool_choice": "required"}),
    "functions": ([{"name": "f"}], REFUSED, {}),
    "function_call": ("auto", REFUSED, {}),
    "modalities": (["audio"], REFUSED, {}),
    "audio": ({"voice": "x"}, REFUSED, {}),
    "web_search_options": ({}, REFUSED, {}),
    "moderation": ({"model": "m"}, REFUSED, {}),
    "verbosity": ("low", REFUSED, {}),
    "chat_template": ("{{ messages }}", REFUSED, {}),
    "documents": ([{"text": "a"}], REFUSED, {}),
}
OF_COMPLETIONS: dict[str, Row] = {
    "add_special_tokens": (False, PROMPT, {}),
    "reasoning_effort": ("high", REFUSED, {}),
    "enable_thinking": (True, REFUSED, {}),
    "chat_template_kwargs": ({"shade": "blue"}, REFUSED, {}),
    "tools": ([TOOL], REFUSED, {}),
    "top_logprobs": (2, REFUSED, {}),
    "prompt": ("Yo", PROMPT, {}),
    "logprobs": (2, "sampling.logprobs", {}),
}
TABLES = {CHAT: BOTH | OF_CHAT, COMPLETIONS: BOTH | OF_COMPLETIONS}
ROWS = [(path, field, *row) for path, table in TABLES.items() for field, row in table.items()]


def observe(path: str, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The response, and what can be seen of a request: the answer, and all that the engine was asked for."""
    engine = FakeEngine(says("Hello"), files=FILES)
    body, headers = BODIES[path] | fields, {"x-request-id": "r"}
    response = call(make_app(engine), "POST", path, json=body, headers=headers)
    seen: dict[str, Any] = {ANSWER: response.text, COUNT: len(engine.submitted)}
    for request in engine.submitted[:1]:
        for name in request.__struct_fields__:
            value = getattr(request, name)
            if isinstance(value, msgspec.Struct):
                seen |= {f"{name}.{key}": getattr(value, key) for key in value.__struct_fields__}
            else:
                seen[name] = value
    return response, seen


@pytest.mark.parametrize(
    ("path", "schema"), [(CHAT, ChatCompletionRequest), (COMPLETIONS, CompletionRequest)]
)
def test_the_table_has_every_field(path: str, schema: type[msgspec.Struct]) -> None:
    assert set(TABLES[path]) == set(schema.__struct_fields__)


@pytest.mark.parametrize(
    ("path", "field", "value", "changes", "needs"), ROWS, ids=[f"{row[0][4:8]}-{row[1]}" for row in ROWS]
)
def test_each_field_is_honoured_or_refused_by_name(
    path: str, field: str, value: Any, changes: str, needs: dict[str, Any]
) -> None:
    plain, before = observe(path, needs)
    assert plain.status_code == 200, plain.text
    response, after = observe(path, needs | {field: value})
    if changes == REFUSED:
        assert response.status_code in (400, 404), response.text
        assert response.json()["error"]["param"] == field
        return
    assert response.status_code == 200, response.text
    different = {name for name in after if after[name] != before.get(name)}
    assert (changes in different) if changes != NOTHING else not different
    # Null is the same as nothing said.
    if field not in ("messages", "prompt"):
        assert (
            observe(path, needs | {field: None})[1]
            == observe(path, {k: needs[k] for k in needs if k != field})[1]
        )
