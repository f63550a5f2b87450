"""The output pipeline: text straight through, or through a reasoning parser, then a tool parser."""

from __future__ import annotations

from mlxd.chat.pipeline import OutputPipeline
from mlxd.chat.types import Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart


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
