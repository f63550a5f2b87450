"""Tools and tool_choice as clients send them, and as text for models whose template knows none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlxd.chat import tool_parsers
from mlxd.chat.tool_text import instructions, with_instructions, without_calls
from mlxd.chat.tools import ToolChoice, read_tool_choice, read_tools, template_tools
from mlxd.chat.types import TextDelta, ToolCallDelta, ToolCallStart, ToolSpec
from mlxd.errors import InvalidRequestError

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city", "parameters": SCHEMA},
}
TIME = {"type": "function", "function": {"name": "time"}}
SPECS = read_tools([WEATHER, TIME])


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def test_tools_are_read() -> None:
    assert (
        ToolSpec(name="weather", description="Of a city", parameters=SCHEMA),
        ToolSpec(name="time"),
    ) == SPECS
    assert read_tools(None) == read_tools([]) == ()
    nulls = function(description=None, parameters=None, strict=None)
    assert read_tools([nulls]) == (ToolSpec(name="f"),)
    assert read_tools([function(strict=True)])[0].strict is True
    assert read_tools([{"function": {"name": "mcp__server.tool:a/b-c"}}])[0].name == "mcp__server.tool:a/b-c"


def test_templates_see_what_the_client_sent() -> None:
    returns = {"type": "string"}
    [tool] = template_tools(read_tools([function(parameters=SCHEMA, returns=returns)]))
    assert tool == {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "returns": returns}}
    # In the client's order, because the model reads it.
    upside_down = {"properties": {}, "type": "object"}
    [tool] = template_tools(read_tools([function(parameters=upside_down)]))
    assert json.dumps(tool["function"]["parameters"]) == json.dumps(upside_down)
    [tool] = template_tools(read_tools([TIME]))
    assert tool["function"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        (["weather"], "tools[0]"),
        ([WEATHER, {"type": "web_search"}], "tools[1].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": "f"}], "tools[0].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([function(name="")], "tools[0].function.name"),
        ([function(name="a b")], "tools[0].function.name"),
        ([function(name="a" * 129)], "tools[0].function.name"),
        ([function(name=5)], "tools[0].function.name"),
        ([function(description=5)], "tools[0].function.description"),
        ([function(parameters=[])], "tools[0].function.parameters"),
        ([function(parameters={"type": "array"})], "tools[0].function.parameters"),
        ([function(parameters={"properties": []})], "tools[0].function.parameters.properties"),
        ([function(strict="yes")], "tools[0].function.strict"),
        ([WEATHER, TIME, WEATHER], "tools[2].function.name"),
        ([function(name=f"f{n}") for n in range(1025)], "tools"),
    ],
)
def test_bad_tools_are_refused_by_place(tools: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        read_tools(tools)
    assert error.value.param == param and str(error.value).startswith(param)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        ("any", ToolChoice(mode="required")),
        (
            {"type": "function", "function": {"name": "time"}},
            ToolChoice(mode="required", names=("time",), parallel=False),
        ),
        (
            {"type": "function", "name": "time"},
            ToolChoice(mode="required", names=("time",), parallel=False),
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME]}},
            ToolChoice(mode="required", names=("time",)),
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]},
            ToolChoice(mode="auto", names=("time",)),
        ),
    ],
)
def test_choices(choice: Any, expected: ToolChoice) -> None:
    assert read_tool_choice(choice, SPECS) == expected
    one = read_tool_choice(choice, SPECS, parallel=False)
    assert not one.parallel and (one.mode, one.names) == (expected.mode, expected.names)


def test_only_what_may_be_called_is_offered() -> None:
    assert ToolChoice().offered(SPECS) == SPECS
    assert ToolChoice(mode="none").offered(SPECS) == ()
    assert ToolChoice(names=("time",)).offered(SPECS) == SPECS[1:]


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("sometimes", "tool_choice"),
        (5, "tool_choice"),
        ({}, "tool_choice"),
        ({"type": "custom"}, "tool_choice"),
        ({"type": "function"}, "tool_choice.function.name"),
        ({"type": "function", "function": "time"}, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "tea"}}, "tool_choice.function.name"),
        ({"type": "allowed_tools", "allowed_tools": 5}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "any"}}, "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools", "allowed_tools": {}}, "tool_choice.allowed_tools.tools"),
        ({"type": "allowed_tools", "allowed_tools": {"tools": []}}, "tool_choice.allowed_tools.tools"),
        (
            {"type": "allowed_tools", "allowed_tools": {"tools": [TIME, {"name": "tea"}]}},
            "tool_choice.allowed_tools.tools[1].function.name",
        ),
    ],
)
def test_bad_choices_are_refused_by_place(choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        read_tool_choice(choice, SPECS)
    assert error.value.param == param


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
def test_a_call_of_no_tool_cannot_be_asked_for(choice: Any) -> None:
    with pytest.raises(InvalidRequestError):
        read_tool_choice(choice, ())


def test_instructions_describe_every_tool_and_how_to_call() -> None:
    text = instructions(SPECS)
    described = text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in described] == template_tools(SPECS)
    # The example is a call, for the parsers that are meant to read it.
    example = text[text.index("<tool_call>\n{") : text.rindex("</tool_call>")] + "</tool_call>"
    for name in ("hermes", "auto"):
        parser = tool_parsers.make_parser(name, SPECS, make_id=lambda: "call_1")
        events = parser.feed(example) + parser.finish()
        assert events == [
            ToolCallStart(0, "call_1", "the-function"),
            ToolCallDelta(0, '{"an-argument": "its value"}'),
        ]


def test_where_instructions_stand() -> None:
    block = instructions(SPECS)
    user = {"role": "user", "content": "Hi"}
    system = {"role": "system", "content": "Be brief."}
    parts = {
        "role": "developer",
        "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
    }

    def placed(messages: list[Any], supports_system: bool = True) -> list[Any]:
        before = json.dumps(messages)
        changed = with_instructions(messages, SPECS, supports_system=supports_system)
        assert json.dumps(messages) == before
        return changed

    assert placed([system, user]) == [{"role": "system", "content": f"Be brief.\n\n{block}"}, user]
    assert placed([parts, user])[0] == {"role": "developer", "content": f"Be\nbrief.\n\n{block}"}
    assert placed([{"role": "system", "content": ""}, user])[0]["content"] == block
    assert placed([user]) == [{"role": "system", "content": block}, user]
    assert placed([user], supports_system=False) == [{"role": "user", "content": f"{block}\n\nHi"}]
    assert placed([], supports_system=False) == [{"role": "user", "content": block}]


def test_history_as_text() -> None:
    def call(name: str, arguments: Any) -> dict[str, Any]:
        return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}

    def result(text: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": "c", "content": text}

    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Well:",
            "tool_calls": [call("f", '{"a": 1}'), call("g", {"b": "ä"})],
        },
        result("1"),
        {"role": "tool", "content": [{"type": "text", "text": "2"}]},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": None, "tool_calls": [call("h", None), call("i", "broken")]},
        result("3"),
        {"role": "assistant", "content": "So."},
        result("4"),
    ]
    before = json.dumps(messages)
    text = without_calls(messages)
    assert json.dumps(messages) == before
    assert text == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": 'Well:\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {"b": "ä"}}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>\nAnd?",
        },
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "h", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "i", "arguments": broken}\n</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\n3\n</tool_response>"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "<tool_response>\n4\n</tool_response>"},
    ]
    plain = [{"role": "user", "content": [{"type": "image_url"}]}]
    assert without_calls(plain) == plain


def test_history_as_text_is_read_as_the_calls_it_was() -> None:
    message = {"role": "assistant", "content": "Well:", "tool_calls": []}
    message["tool_calls"] = [{"function": {"name": "f", "arguments": {"a": [1, "</tool_call>"]}}}]
    [text] = without_calls([message])
    parser = tool_parsers.make_parser("hermes", None, make_id=lambda: "call_1")
    events = parser.feed(text["content"]) + parser.finish()
    assert events[0] == TextDelta("Well:")
    assert [type(event) for event in events[1:]] == [ToolCallStart, ToolCallDelta]
    assert json.loads(events[2].arguments) == {"a": [1, "</tool_call>"]}  # type: ignore[union-attr]
