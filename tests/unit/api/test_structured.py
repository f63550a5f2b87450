"""Fields that ask for an answer of a certain form: what reaches the worker, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher

from mlxd.api.grammar_cache import GrammarCache
from mlxd.api.grammars import common_tokens
from mlxd.step import MAX_FORCED_BYTES, GrammarSpec
from mlxd.text.tokenizer import Tokenizer
from tests.unit.api.fakes import FILES, TOKENIZER, FakeEngine, call, make_app

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
Send = Callable[..., Any]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def ask(engine: FakeEngine, fields: dict[str, Any], path: str = CHAT) -> Any:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return call(make_app(engine), "POST", path, json=prompt | fields)


def grammar_of(engine: FakeEngine) -> GrammarSpec | None:
    [request] = engine.submitted
    return request.sampling.grammar


ASKS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": OBJECT, "strict": False}}},
    {"structured_outputs": {"json": OBJECT, "regex": None}},
    {"structured_outputs": {"json_object": True}},
    {"guided_json": OBJECT},
    {"guided_json": '{"type": "integer"}'},
    {"guided_regex": "[a-z]+ (b|c)"},
    {"guided_choice": ["one", 'tw"o', "three\n", "日本"]},
    {"guided_grammar": 'root ::= "a" [0-9]+'},
    {"guided_grammar": 'start: "a" /[0-9]+/'},
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fields", ASKS, ids=str)
def test_a_form_becomes_a_grammar_that_compiles(
    engine: FakeEngine, fields: dict[str, Any], path: str
) -> None:
    assert ask(engine, fields, path).status_code == 200
    spec = grammar_of(engine)
    assert spec is not None and spec.triggers == ()
    assert LLMatcher.validate_grammar(spec.grammar) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {"json_object": False}},
    ],
    ids=str,
)
def test_any_text_needs_no_grammar(engine: FakeEngine, fields: dict[str, Any]) -> None:
    assert ask(engine, fields).status_code == 200
    assert grammar_of(engine) is None


SCHEMA_PARAM = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, SCHEMA_PARAM),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, SCHEMA_PARAM),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": "ab"}, "guided_choice"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_grammar": "start: NOTHING"}, "guided_grammar"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"guided_grammar": 'root ::= "a" root'}, "guided_grammar"),
        ({"guided_regex": r"[^\x00-\x{10FFFF}]"}, "guided_regex"),
        ({"structured_outputs": {"json": OBJECT, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
    ids=str,
)
def test_what_is_wrong_is_a_400_that_names_it(engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    response = ask(engine, fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not engine.submitted


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"type": "array", "contains": {"type": "integer"}},
        {"not": {"type": "integer"}},
        {"if": {"type": "integer"}, "then": {"minimum": 3}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
        {"type": "object", "dependencies": {"a": ["b"]}},
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"type": "object", "unevaluatedProperties": False},
        {"type": "array", "unevaluatedItems": False},
        {"type": "object", "minProperties": 2},
        {"type": "object", "properties": {"a": {"type": "array", "items": {"minProperties": 2}}}},
        {"$recursiveRef": "#"},
        {"$dynamicRef": "#a"},
        {"$ref": "https://example.com/schema"},
        {"$ref": "#/$defs/missing"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"type": "string", "format": "regex"},
        {"type": "string", "pattern": "(a)\\1"},
        {"type": "strin"},
        {"type": "string", "format": ["date"]},
        {"type": "string", "format": "date", "allOf": 5},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True},
        False,
    ],
    ids=str,
)
def test_a_schema_that_nobody_would_enforce_is_refused(engine: FakeEngine, schema: Any) -> None:
    response = ask(engine, {"guided_json": schema})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "guided_json"


def test_a_schema_with_too_many_keys_to_choose_from_is_refused_before_the_worker_fails(
    engine: FakeEngine,
) -> None:
    schema = {"type": "object", "properties": {f"key{i}": {"type": "integer"} for i in range(510)}}
    response = ask(engine, {"guided_json": schema})
    assert response.status_code == 400
    assert "Current row has 2047 items; max is 2000" in response.json()["error"]["message"]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    response = ask(engine, {"tools": [tool], "tool_choice": "required"})
    assert response.json()["error"]["param"] == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("opening", "status"),
    [('"ab"{512}', 400), ('"ab"{513}', 200), ("<[5]>{2}", 400), ("<[5]>{900}", 200)],
)
def test_a_grammar_is_followed_for_a_thousand_forced_bytes(
    engine: FakeEngine, opening: str, status: int
) -> None:
    """llguidance keeps the interpreter for that: 80 ms for half a million, which x{500000} asks for."""
    grammar = f"start: {opening} NOTHING\nNOTHING: /[a-z]+/ & /[0-9]+/"
    assert ask(engine, {"guided_grammar": grammar}).status_code == status


@pytest.mark.parametrize(
    "make",
    [
        lambda size: {"guided_regex": f"x{{{size}}}"},
        lambda size: {"guided_grammar": f'start: "x"{{{size - 1}}} "y" /[a-z]/'},
        lambda size: {"guided_choice": ["x" * size]},
        lambda size: {"guided_json": {"const": "x" * (size - len('""'))}},
    ],
)
def test_a_longer_text_without_a_choice_is_refused(
    engine: FakeEngine, make: Callable[[int], dict[str, Any]]
) -> None:
    response = ask(engine, make(MAX_FORCED_BYTES + 1))
    assert response.status_code == 400
    assert "no choice is left about the first 16385 bytes" in response.json()["error"]["message"]
    assert ask(engine, make(MAX_FORCED_BYTES)).status_code == 200


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": False},
        {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"], "minProperties": 2},
        {"type": "object", "minProperties": 1},
        {
            "title": "T",
            "description": "d",
            "examples": [1],
            "default": 1,
            "$comment": "c",
            "deprecated": True,
        },
        True,
    ],
    ids=str,
)
def test_what_changes_nothing_is_not_refused(engine: FakeEngine, schema: Any) -> None:
    assert ask(engine, {"guided_json": schema}).status_code == 200


def test_a_model_without_tokenizer_json_is_held_to_nothing(engine: FakeEngine, tmp_path: Path) -> None:
    engine.files = replace(FILES, path=tmp_path)
    response = ask(engine, {"guided_regex": "a"})
    assert response.status_code == 400
    assert "tokenizer.json" in response.json()["error"]["message"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": OBJECT}}
BAD_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "g", "parameters": {"not": {"type": "object"}}},
}
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
def test_a_call_that_is_asked_for_is_all_the_answer(engine: FakeEngine, choice: Any) -> None:
    assert ask(engine, {"tools": [TOOL], "tool_choice": choice}).status_code == 200
    spec = grammar_of(engine)
    assert spec is not None and spec.triggers == ()
    assert LLMatcher.validate_grammar(spec.grammar) == ""
    assert "<tool_call>" in spec.grammar


TOOLS = [TOOL, {"type": "function", "function": {"name": "fast", "parameters": OBJECT}}]


@pytest.mark.parametrize(
    ("tools", "begins", "whole"),
    [
        ([TOOL], '<tool_call>\n{"name": "f", "argu', '<tool_call>\n{"name": "f", "arguments": '),
        (TOOLS, '<tool_call>\n{"name": ', '<tool_call>\n{"name": "f'),
    ],
)
def test_what_a_call_must_begin_with_is_not_sampled(
    engine: FakeEngine, tools: list[Any], begins: str, whole: str
) -> None:
    assert ask(engine, {"tools": tools, "tool_choice": "required"}).status_code == 200
    forced = TOKENIZER.decode(engine.submitted[0].forced_token_ids, skip_special_tokens=False)
    assert forced.startswith(begins) and whole.startswith(forced)


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "auto"},
        {"tool_choice": "required", "logprobs": True},
        {"tool_choice": "required", "stop": "call"},
        {"tool_choice": "none", "guided_choice": ["a", "ab"]},
    ],
    ids=str,
)
def test_all_else_is_sampled(engine: FakeEngine, fields: dict[str, Any]) -> None:
    assert ask(engine, {"tools": [TOOL]} | fields).status_code == 200
    assert engine.submitted[0].forced_token_ids == ()


def test_who_may_think_first_is_not_forced() -> None:
    engine = FakeEngine()
    app = make_app(engine, {"chat": {"reasoning_parser": "qwen3"}})
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "tool_choice": "required"}
    assert call(app, "POST", CHAT, json=body).status_code == 200
    assert engine.submitted[0].forced_token_ids == ()


def test_a_tokenizer_that_puts_a_space_before_all_text_forces_nothing() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"▁": 0, "a": 1, "{": 2, "}": 3}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    assert common_tokens(Tokenizer(tokenizer), ["aa"], ["{", "}"]) == ()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    assert common_tokens(Tokenizer(tokenizer), ["aa"], ["{", "}"]) == (1, 1)


def test_a_call_that_is_allowed_is_held_to_its_schema_once_begun(engine: FakeEngine) -> None:
    assert ask(engine, {"tools": [TOOL, BAD_TOOL]}).status_code == 200
    spec = grammar_of(engine)
    assert spec is not None and spec.triggers == ("<tool_call>",) and spec.repeats
    assert LLMatcher.validate_grammar(spec.grammar) == ""


def test_no_tools_no_calls(engine: FakeEngine) -> None:
    assert ask(engine, {"tools": [TOOL], "tool_choice": "none"}).status_code == 200
    assert grammar_of(engine) is None


def test_with_tools_the_answer_has_its_form_or_is_a_call(engine: FakeEngine) -> None:
    assert ask(engine, {"tools": [TOOL], "guided_choice": ["yes", "no"]}).status_code == 200
    spec = grammar_of(engine)
    assert spec is not None and "@answer | " in spec.grammar
    assert LLMatcher.validate_grammar(spec.grammar) == ""


def test_a_tool_whose_schema_cannot_be_enforced_is_refused_where_it_must_hold(engine: FakeEngine) -> None:
    strict = {"type": "function", "function": {**BAD_TOOL["function"], "strict": True}}
    for fields in ({"tools": [TOOL, BAD_TOOL], "tool_choice": "required"}, {"tools": [TOOL, strict]}):
        response = ask(engine, fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools[1].function.parameters"


@pytest.mark.parametrize(
    ("parser", "beginning", "triggers"),
    [
        ("gemma4", "<|tool_call>call:f{", ("<|tool_call>", "<start_function_call>")),
        ("minimax", '<minimax:tool_call>\n<invoke name="f">\n', ("<minimax:tool_call>",)),
        (
            "deepseek_v4",
            '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n',
            ("<｜DSML｜tool_calls>", "<｜DSML｜function_calls>", '<｜DSML｜invoke name="'),
        ),
        ("glm47", "<tool_call>f\n", ("<tool_call>",)),
        ("qwen3_coder", "<tool_call>\n<function=f>\n", ("<tool_call>", "<function=")),
        ("nemotron", "<tool_call>\n<function=f>\n", ("<tool_call>", "<TOOLCALL>", "<function=")),
    ],
)
def test_formats_without_json_are_enforced_too(
    parser: str, beginning: str, triggers: tuple[str, ...]
) -> None:
    engine = FakeEngine()
    app = make_app(engine, {"chat": {"tool_call_parser": parser}})
    for fields in ({"tool_choice": "required"}, {}):
        body = {
            "messages": [{"role": "user", "content": "hi"}],
            "tools": [TOOL, BAD_TOOL][: 1 + (not fields)],
        }
        assert call(app, "POST", CHAT, json=body | fields).status_code == 200
    forced, free = (params.sampling.grammar for params in engine.submitted)
    assert forced is not None and free is not None
    assert forced.triggers == () and free.triggers == triggers and free.repeats
    assert LLMatcher.validate_grammar(forced.grammar) == LLMatcher.validate_grammar(free.grammar) == ""
    assert engine.tokenizer is not None
    text = engine.tokenizer.decode(engine.submitted[0].forced_token_ids, skip_special_tokens=False)
    assert text and beginning.startswith(text)
    assert engine.submitted[1].forced_token_ids == ()


def test_tools_that_are_too_many_for_one_grammar_are_free_to_be_called(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless one is strict: then it must be held to its schema."""

    async def error(self: GrammarCache, grammar: str) -> str | None:
        return "too large" if "arguments_0_0" in grammar else None

    monkeypatch.setattr(GrammarCache, "error", error)
    for strict, status in ((False, 200), (True, 400)):
        tool = {"type": "function", "function": {**TOOL["function"], "strict": strict}}
        assert ask(engine, {"tools": [tool]}).status_code == status
    assert [params.sampling.grammar for params in engine.submitted] == [None]


def test_without_a_parser_no_call_is_enforced(engine: FakeEngine) -> None:
    app = make_app(engine, {"chat": {"tool_call_parser": "none"}})
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "tool_choice": "required"}
    response = call(app, "POST", CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tool_choice"
    assert not engine.submitted


def test_thinking_comes_first() -> None:
    engine = FakeEngine()
    app = make_app(engine, {"chat": {"reasoning_parser": "qwen3"}})
    body = {"messages": [{"role": "user", "content": "hi"}], "guided_choice": ["yes", "no"]}
    assert call(app, "POST", CHAT, json=body).status_code == 200
    spec = grammar_of(engine)
    assert spec is not None and spec.triggers == ("</think>",)
    assert len(spec.opening_token_ids) == 1


def test_where_the_model_opens_no_block_itself_nothing_is_waited_for() -> None:
    engine = FakeEngine()
    app = make_app(engine, {"chat": {"reasoning_parser": "kimi_k3"}})
    body = {"messages": [{"role": "user", "content": "hi"}], "guided_choice": ["yes", "no"]}
    assert call(app, "POST", CHAT, json=body).status_code == 200
    spec = grammar_of(engine)
    assert spec is not None and spec.triggers == () and spec.opening_token_ids == ()


@pytest.mark.parametrize("parser", ["gpt_oss", "muse"])
def test_a_message_that_is_continued_is_held_at_once(parser: str) -> None:
    """Its header is in the prompt: who waited for one would never let the answer end."""
    engine = FakeEngine()
    app = make_app(engine, {"chat": {"reasoning_parser": parser}})
    asked = {"messages": [{"role": "user", "content": "hi"}], "guided_choice": ["yes", "no"]}
    begun = {
        "messages": [*asked["messages"], {"role": "assistant", "content": "My answer: "}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    for body in (asked, asked | begun):
        assert call(app, "POST", CHAT, json=body).status_code == 200
    fresh, continued = (params.sampling.grammar for params in engine.submitted)
    assert fresh is not None and fresh.triggers
    assert continued is not None and continued.triggers == ()
