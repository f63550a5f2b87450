"""Grammars of calls: whatever they let through, the parser reads as calls, with arguments that are valid."""

from __future__ import annotations

import random

import pytest

from mlxd.chat import structured
from mlxd.chat.call_grammar import SYNTAXES, CallGrammar, arguments_schema, call_syntax
from mlxd.chat.tool_parsers import get, make_parser, names
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
    "[ARGS]",
    "<|tool_call>",
    "<tool_call|>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|start|>",
    "<|end|>",
    "<|call|>",
)


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(str(tmp_path_factory.mktemp("tokenizer")), SPECIAL_TOKENS)


def call_grammar(walker: Walker, parser: str, tools: list[ToolSpec], *, parallel: bool = True) -> CallGrammar:
    syntax = call_syntax(parser)
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
    for _ in range(12):
        text = walker.walk(grammar, source, max_tokens=3000)
        assert text is not None
        found, prose = read(parser, tools, text)
        assert not prose.strip(), text
        check(found, tools)
        counts.append(len(found))
    assert min(counts) >= 1
    assert max(counts) >= 2


LAZY = [name for name, syntax in SYNTAXES.items() if syntax.trigger]


@pytest.mark.parametrize("parser", LAZY)
def test_behind_its_trigger_a_call_goes_on_as_it_must(walker: Walker, parser: str) -> None:
    source = random.Random(parser)
    # A message of Harmony's ends the turn with its call, and nothing may stand before a name.
    space = "" if calls_begin_with_a_name(parser) else "\n"
    after = "<|call|>" if parser == "harmony" else " Done."
    for tool in TOOLS:
        calls = call_grammar(walker, parser, [tool])
        rest = walker.walk(structured.compose(calls.after_trigger(), calls.parts), source)
        assert rest is not None
        text = f"Let me see. {calls.trigger}{space}{rest}{after}"
        found, prose = read(parser, [tool], text)
        assert {name for name, _ in found} == {tool.name}, text
        assert prose.split() == ["Let", "me", "see.", *after.split("<|call|>")[0].split()]
        check(found, [tool])


def calls_begin_with_a_name(parser: str) -> bool:
    return parser in ("harmony", "functionary", "llama")


@pytest.mark.parametrize(
    ("parser", "rest"),
    [
        ("hermes", '{"name": "tool_2", "arguments": {"city": "Rome"}}\n</tool_call>'),
        ("mistral", '[{"name": "tool_2", "arguments": {"city": "Rome"}}]'),
        ("mistral", 'tool_2{"city": "Rome"}'),
        ("mistral", 'tool_2[ARGS]{"city": "Rome"}'),
        ("llama", 'tool_2>{"city": "Rome"}</function>'),
        ("functionary", 'tool_2>{"city": "Rome"}</function>'),
        (
            "deepseek",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_2\n```json\n"
            '{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ),
        (
            "deepseek",
            '<｜tool▁call▁begin｜>tool_2<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>'
            '<｜tool▁call▁begin｜>tool_2<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>",
        ),
        (
            "kimi",
            '<|tool_call_begin|>functions.tool_2:0<|tool_call_argument_begin|>{"city": "Rome"}'
            "<|tool_call_end|><|tool_calls_section_end|>",
        ),
        ("harmony", 'tool_2 <|constrain|>json<|message|>{"city": "Rome"}'),
        ("harmony", 'tool_2 json<|message|>{"city": "Rome"}'),
        ("harmony", 'tool_2<|message|>{"city": "Rome"}'),
    ],
)
def test_every_way_in_which_a_family_goes_on_is_allowed(walker: Walker, parser: str, rest: str) -> None:
    calls = call_grammar(walker, parser, TOOLS)
    grammar = structured.compose(calls.after_trigger(), calls.parts)
    assert walker.matches(grammar, rest)
    assert not walker.matches(grammar, rest.replace("tool_2", "tool_99"))
    assert not walker.matches(grammar, rest.replace('"Rome"', "5"))


def test_every_parser_has_a_syntax() -> None:
    assert {call_syntax(name) for name in names()} == set(SYNTAXES.values())


def test_triggers_begin_calls_that_the_parser_looks_for() -> None:
    for parser in LAZY:
        trigger = SYNTAXES[parser].trigger
        assert any(trigger.startswith(marker) for marker in get(parser).markers), parser


def test_harmony_may_think_first(walker: Walker) -> None:
    calls = call_grammar(walker, "harmony", TOOLS[2:3])
    grammar = structured.compose(calls.after_analysis(calls.required()), calls.parts)
    call = '<|channel|>commentary to=functions.tool_2 <|constrain|>json<|message|>{"city": "Rome"}'
    thinking = "<|channel|>analysis<|message|>Which city?\nRome.<|end|><|start|>assistant"
    assert walker.matches(grammar, call)
    assert walker.matches(grammar, thinking + call)
    assert not walker.matches(grammar, thinking)
