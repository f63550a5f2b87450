"""Grammars of calls: whatever they let through, the parser reads as calls, with arguments that are valid."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from mlxd.chat import structured
from mlxd.chat.call_grammar import SYNTAXES, CallGrammar, arguments_schema, call_syntax
from mlxd.chat.tool_parsers import make_parser
from mlxd.chat.types import TextDelta, ToolCallDelta, ToolCallStart, ToolSpec
from tests.unit.chat.grammar_walk import Walker

WORD = {"type": "string", "maxLength": 8}
COUNT = {"type": "integer", "minimum": 0, "maximum": 999}
SPECIAL_TOKENS = (
    "[TOOL_CALLS]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|start|>",
    "<|end|>",
)


def record(properties: dict[str, Any], **keywords: Any) -> dict[str, Any]:
    required = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **keywords,
    }


SCHEMAS: list[dict[str, Any]] = [
    {},
    record({}),
    record({"city": WORD}),
    record({"a": COUNT, "b": COUNT}),
    record({"unit": {"enum": ["c", "f"]}, "city": WORD}),
    record({"tags": {"type": "array", "items": WORD, "maxItems": 3}}),
    record({"on": {"type": "boolean"}}),
    record({"day": {"type": "string", "format": "date"}}),
    record({"point": record({"x": {"type": "integer", "minimum": -5, "maximum": 5}, "y": COUNT})}),
    record({"mail": {"type": "string", "pattern": "^[a-z]{2,5}@[a-z]{2,5}\\.com$"}}),
    record({"value": {"anyOf": [COUNT, {"type": "null"}]}}),
    record({"kind": {"const": "fixed"}, "n": COUNT}),
    record({"q": WORD, "limit": COUNT}, required=["q"]),
    record({"rows": {"type": "array", "items": record({"id": COUNT}), "minItems": 1, "maxItems": 2}}),
    record({"id": {"type": "string", "format": "uuid"}}),
    record({"note": {"type": ["string", "null"], "maxLength": 5}}),
    record({"x": {"$ref": "#/$defs/c"}}, **{"$defs": {"c": {"enum": ["red", "blue"]}}}),
    record({"z": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50}}),
    record({"w": {"type": "string", "minLength": 2, "maxLength": 4}}),
    record({"pair": {"type": "array", "prefixItems": [COUNT, WORD], "items": False, "minItems": 2}}),
]
TOOLS = [ToolSpec(name=f"tool_{i}", parameters=schema) for i, schema in enumerate(SCHEMAS)]


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(str(tmp_path_factory.mktemp("tokenizer")), SPECIAL_TOKENS)


def call_grammar(walker: Walker, parser: str, tools: list[ToolSpec], *, parallel: bool = True) -> CallGrammar:
    syntax = call_syntax(parser)
    assert syntax is not None
    return CallGrammar(
        syntax,
        tools,
        [structured.json_schema(arguments_schema(tool), "tools").grammar for tool in tools],
        special_tokens=walker.special_tokens,
        parallel=parallel,
    )


def read(parser: str, tools: list[ToolSpec], text: str) -> tuple[list[tuple[str, str]], str]:
    """Calls as (name, arguments), and the text around them."""
    reader = make_parser(parser, tools, make_id=lambda: "call_" + "0" * 24)
    events = reader.feed(text) + reader.finish()
    names = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, ToolCallDelta):
            arguments[event.index] += event.arguments
    prose = "".join(event.text for event in events if isinstance(event, TextDelta))
    return list(zip(names, arguments, strict=True)), prose


def check(calls: list[tuple[str, str]], tools: list[ToolSpec]) -> None:
    for name, arguments in calls:
        [tool] = [tool for tool in tools if tool.name == name]
        schema = arguments_schema(tool)
        jsonschema.validate(json.loads(arguments), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("parser", SYNTAXES)
def test_every_call_is_read_and_valid(walker: Walker, parser: str) -> None:
    source = random.Random(parser)
    for i, tool in enumerate(TOOLS):
        tools = [tool, TOOLS[(i + 7) % len(TOOLS)]]
        calls = call_grammar(walker, parser, tools, parallel=False)
        text = walker.walk(structured.compose(calls.required(), calls.parts), source)
        assert text is not None
        found, prose = read(parser, tools, text)
        assert len(found) == 1, text
        assert not prose.strip(), text
        check(found, tools)


@pytest.mark.parametrize("parser", [name for name, syntax in SYNTAXES.items() if not syntax.one_only])
def test_several_calls_follow_each_other(walker: Walker, parser: str) -> None:
    source = random.Random(parser)
    tools = TOOLS[1:5]
    calls = call_grammar(walker, parser, tools)
    grammar = structured.compose(calls.required(), calls.parts)
    counts = []
    for _ in range(6):
        text = walker.walk(grammar, source, max_tokens=3000)
        assert text is not None
        found, prose = read(parser, tools, text)
        assert not prose.strip(), text
        check(found, tools)
        counts.append(len(found))
    assert min(counts) >= 1
    assert max(counts) >= 2


@pytest.mark.parametrize("parser", [name for name, syntax in SYNTAXES.items() if syntax.trigger])
def test_behind_its_trigger_a_call_goes_on_as_it_must(walker: Walker, parser: str) -> None:
    source = random.Random(parser)
    for tool in TOOLS:
        calls = call_grammar(walker, parser, [tool])
        rest = walker.walk(structured.compose(calls.after_trigger(), calls.parts), source)
        assert rest is not None
        found, prose = read(parser, [tool], f"Let me see. {calls.trigger}\n{rest} Done.")
        assert [name for name, _ in found] == [tool.name]
        assert prose.split() == ["Let", "me", "see.", "Done."]
        check(found, [tool])


def test_triggers_begin_their_calls() -> None:
    for syntax in SYNTAXES.values():
        assert (syntax.opening or syntax.before).startswith(syntax.trigger)


def test_harmony_may_think_first(walker: Walker) -> None:
    calls = call_grammar(walker, "harmony", TOOLS[2:3])
    grammar = structured.compose(calls.after_analysis(calls.required()), calls.parts)
    call = '<|channel|>commentary to=functions.tool_2 <|constrain|>json<|message|>{"city": "Rome"}'
    thinking = "<|channel|>analysis<|message|>Which city?\nRome.<|end|><|start|>assistant"
    assert walker.matches(grammar, call)
    assert walker.matches(grammar, thinking + call)
    assert not walker.matches(grammar, thinking)


def test_parsers_that_read_no_json_have_no_grammar() -> None:
    assert call_syntax("gemma4") is None
    assert call_syntax("qwen3") is SYNTAXES["qwen"], "an alias"
