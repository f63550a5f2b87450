"""The output pipeline: text straight through, or through a reasoning parser, then a tool parser."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from mlxd.chat import tool_parsers
from mlxd.chat.pipeline import OutputPipeline
from mlxd.chat.reasoning import formats
from mlxd.chat.special_tokens import SpecialTokenFilter
from mlxd.chat.types import Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart
from mlxd.text.markers import MarkerScanner


class Upper:
    """A parser of reasoning: capitals are thoughts, the rest is text. Holds back each text's last letter."""

    def __init__(self) -> None:
        self.held = ""

    def feed(self, text: str) -> list[Event]:
        text, self.held = self.held + text[:-1], text[-1]
        return [self.event(letter) for letter in text]

    def finish(self) -> list[Event]:
        return [self.event(self.held)] if self.held else []

    @staticmethod
    def event(letter: str) -> Event:
        return ReasoningDelta(letter) if letter.isupper() else TextDelta(letter)


class Digits:
    """A parser of tools: a digit is a whole call; a trailing "?" is one cut off."""

    is_over = False

    def __init__(self) -> None:
        self.index = -1

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        for letter in text:
            if letter.isdigit():
                self.index += 1
                events += [
                    ToolCallStart(self.index, f"call_{letter}", letter),
                    ToolCallDelta(self.index, "{}"),
                ]
            else:
                events.append(TextDelta(letter))
        return events

    def finish(self) -> list[Event]:
        return [TextDelta("!")]


def run(pipeline: OutputPipeline, *texts: str) -> list[Event]:
    return [event for text in texts for event in pipeline.feed(text)] + pipeline.finish()


def test_without_parsers_text_passes_straight_through() -> None:
    assert run(OutputPipeline(), "a", "", "bc") == [TextDelta("a"), TextDelta("bc")]


def test_a_reasoning_parser_alone() -> None:
    expected = [ReasoningDelta("A"), TextDelta("b"), ReasoningDelta("C")]
    assert run(OutputPipeline(reasoning_parser=Upper()), "Ab", "", "C") == expected


def test_a_tool_parser_alone() -> None:
    expected = [TextDelta("a"), ToolCallStart(0, "call_7", "7"), ToolCallDelta(0, "{}"), TextDelta("!")]
    assert run(OutputPipeline(tool_parser=Digits()), "a", "7") == expected


def test_tools_are_looked_for_in_the_text_and_not_in_the_reasoning() -> None:
    expected = [
        TextDelta("a"),
        ReasoningDelta("B"),
        ToolCallStart(0, "call_1", "1"),
        ToolCallDelta(0, "{}"),
        ReasoningDelta("C"),
        TextDelta("d"),
        ToolCallStart(1, "call_2", "2"),
        ToolCallDelta(1, "{}"),
        TextDelta("!"),
    ]
    # The last digit is held back by the reasoning parser, and still goes through the tool parser.
    assert run(OutputPipeline(Upper(), Digits()), "aB1", "Cd2") == expected


CALL = '<tool_call>{"name": "f", "arguments": {"a": "</think>"}}</tool_call>'
SECOND = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'


def hermes(*, max_calls: int | None = None) -> OutputPipeline:
    """As a Qwen3 whose prompt has opened the block."""
    ids = (f"call_{n}" for n in itertools.count())
    tools = tool_parsers.make_parser("hermes", None, make_id=lambda: next(ids), max_calls=max_calls)
    thinking = formats.get("qwen3").parser(opened=True, interrupts=tools.markers)
    return OutputPipeline(thinking, tools)


def merged(events: list[Event]) -> tuple[str, str, list[tuple[str, str, str]]]:
    """(reasoning, content, calls as (id, name, arguments))"""
    reasoning, content = "", ""
    calls: list[tuple[str, str, str]] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning += text
            case TextDelta(text):
                content += text
            case ToolCallStart(index, call_id, name):
                assert index == len(calls)
                calls.append((call_id, name, ""))
            case ToolCallDelta(index, arguments):
                call_id, name, before = calls[index]
                calls[index] = (call_id, name, before + arguments)
    return reasoning, content, calls


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "names"),
    [
        (f"a</think>b\n{CALL}", "a", "b", ["f"]),
        (f"a {CALL}", "a", "", ["f"]),
        (f"a {CALL}\n{SECOND}", "a", "", ["f", "g"]),
        (f"a {CALL} b", "a b", "", ["f"]),
        (f"a {CALL} b</think> c", "a b", "c", ["f"]),
        (f"a {CALL}</think>c {SECOND} d", "a", "c d", ["f", "g"]),
        (f"a {CALL}</thi", "a </thi", "", ["f"]),
        ("The <tool_call> tag, hm.</think>b", "The <tool_call> tag, hm.", "b", []),
        (f"The <tool_call> tag, hm.</think>b {CALL}", "The <tool_call> tag, hm.", "b", ["f"]),
        ("a <tool_ca", "a <tool_ca", "", []),
        (f"{CALL}", "", "", ["f"]),
    ],
)
def test_a_call_within_thinking_is_a_call(text: str, reasoning: str, content: str, names: list[str]) -> None:
    whole = merged(run(hermes(), text))
    assert whole[:2] == (reasoning, content)
    assert [name for _, name, _ in whole[2]] == names
    for _, name, arguments in whole[2]:
        assert json.loads(arguments) == ({"a": "</think>"} if name == "f" else {})
    assert merged(run(hermes(), *text)) == whole
    rng = random.Random(text)
    for _ in range(200):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(6))
        assert merged(run(hermes(), *map(text.__getitem__, map(slice, [0, *cuts], [*cuts, None])))) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a</think>b {CALL} c {SECOND} d", ("a", "b", ["f"])),
        (f"a {CALL} b</think>c {SECOND}", ("a", "", ["f"])),
        (f'a</think><tool_call>{{"name": "f", "arguments": {{"a": 1, oops}}}} b {SECOND}', ("a", "", ["f"])),
    ],
)
def test_after_the_last_call_that_is_wanted_the_answer_is_over(
    text: str, expected: tuple[str, str, list[str]]
) -> None:
    for pieces in ([text], list(text)):
        pipeline = hermes(max_calls=1)
        reasoning, content, calls = merged(run(pipeline, *pieces))
        assert (reasoning, content, [name for _, name, _ in calls]) == expected
        assert (pipeline.num_calls, pipeline.is_over) == (1, True)
    everything = hermes()
    run(everything, text)
    assert (everything.num_calls, everything.is_over) == (2, False)


def test_the_answer_is_over_with_the_last_character_of_the_call() -> None:
    pipeline = hermes(max_calls=2)
    for character in f"a{CALL}b</think>c{SECOND}".removesuffix("}</tool_call>"):
        pipeline.feed(character)
        assert not pipeline.is_over
    pipeline.feed("}")
    assert pipeline.is_over
    assert pipeline.finish() == []


def test_special_tokens_that_no_parser_read_are_taken_out() -> None:
    special = MarkerScanner(["[TOOL_CALLS]", "[THINK]", "[/THINK]", "<s>", "<pad>"])
    text = '<s>[THINK]a<pad> b[/THINK]c <s>d[THINK]e <pa[TOOL_CALLS]f{"x": "<s>"}<pad>'

    def make() -> OutputPipeline:
        tools = tool_parsers.make_parser("mistral", None, make_id=lambda: "call_123456789")
        return OutputPipeline(
            formats.get("mistral").parser(opened=True), tools, special_tokens=SpecialTokenFilter(special)
        )

    expected = ("a b", "c de <pa", [("123456789", "f", '{"x": "<s>"}')])
    assert merged(run(make(), text)) == expected
    assert merged(run(make(), *text)) == expected


def test_a_filter_alone() -> None:
    pipeline = OutputPipeline(special_tokens=SpecialTokenFilter(MarkerScanner(["<s>"])))
    assert run(pipeline, "<", "s", ">a<", "b<s") == [TextDelta("a"), TextDelta("<b"), TextDelta("<s")]
