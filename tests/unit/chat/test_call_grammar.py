"""Grammars of calls: whatever they let through, the parser reads as calls, with arguments that are valid."""

from __future__ import annotations

import random

import pytest

from mlxd.chat import structured
from mlxd.chat.call_grammar import SYNTAXES, CallGrammar, arguments_schema, call_syntax
from mlxd.chat.tool_parsers import make_parser
from mlxd.chat.types import TextDelta, ToolCallDelta, ToolCallStart, ToolSpec
from tests.unit.chat.grammar_walk import Walker
from tests.unit.chat.made_schemas import TOOLS, problems

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
        assert not problems(arguments_schema(tool), arguments)


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
