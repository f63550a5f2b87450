"""What the tables of cases are made of, and how a case is run: whole, by character, and in random pieces."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from mlxd.chat.tool_parsers import call_ids, make_parser
from mlxd.chat.types import Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart, ToolSpec

NUM_RANDOM_SPLITS = 200

TOOLS = (
    ToolSpec(
        name="get_weather",
        parameters={
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    ),
    ToolSpec(
        name="add",
        parameters={"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    ),
    ToolSpec(
        name="search",
        parameters={
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "limit": {"type": ["integer", "null"]},
                "exact": {"type": "boolean"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "options": {"type": "object"},
                "zip": {"type": "string"},
                "page": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            },
        },
    ),
    ToolSpec(name="get_time", parameters={"type": "object", "properties": {}}),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A text and what must come of it.

    `calls` are names and arguments, `raw` the arguments' very text, `ids` patterns of their ids.
    """

    id: str
    text: str
    calls: Sequence[tuple[str, dict[str, Any]]] = ()
    content: str = ""
    reasoning: str = ""
    raw: Sequence[str] | None = None
    tools: Sequence[ToolSpec] | None = TOOLS
    ids: Sequence[str] = ()


def prose(id: str, text: str, *, tools: Sequence[ToolSpec] | None = TOOLS) -> Case:
    """A text that is no call and must come out as it is."""
    return Case(id, text, content=text, tools=tools)


def run(parser_name: str, pieces: Iterable[str], tools: Sequence[ToolSpec] | None = None) -> list[Event]:
    """Every event of the pieces, adjacent ones of the same thing joined. Ids come from a fixed seed."""
    parser = make_parser(parser_name, tools, make_id=call_ids(random.Random(0)))
    events = [event for piece in pieces if piece for event in parser.feed(piece)]
    return joined(events + parser.finish())


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with adjacent pieces of the same thing joined."""
    groups: list[tuple[Event, list[str]]] = []
    for event in events:
        match event:
            case TextDelta(piece) | ReasoningDelta(piece) | ToolCallDelta(arguments=piece):
                assert piece, "an empty event"
                if groups and type(groups[-1][0]) is type(event):
                    groups[-1][1].append(piece)
                else:
                    groups.append((event, [piece]))
            case _:
                groups.append((event, []))
    return [_with_piece(event, "".join(pieces)) for event, pieces in groups]


def _with_piece(event: Event, piece: str) -> Event:
    match event:
        case TextDelta():
            return TextDelta(piece)
        case ReasoningDelta():
            return ReasoningDelta(piece)
        case ToolCallDelta(index):
            return ToolCallDelta(index, piece)
        case _:
            return event


def calls_of(events: Iterable[Event]) -> list[tuple[str, str, str]]:
    """(id, name, arguments) of each call; asserts that each begins once, in order, before its arguments."""
    calls: list[tuple[str, str, str]] = []
    for event in events:
        match event:
            case ToolCallStart(index, call_id, name):
                assert index == len(calls)
                calls.append((call_id, name, ""))
            case ToolCallDelta(index, arguments):
                assert index == len(calls) - 1
                call_id, name, before = calls[index]
                calls[index] = (call_id, name, before + arguments)
    return calls


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def reasoning_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ReasoningDelta))


def random_pieces(text: str, source: random.Random) -> list[str]:
    """The text in some pieces, cut anywhere."""
    places = sorted(source.randrange(len(text) + 1) for _ in range(source.randint(1, 10)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def check(parser_name: str, case: Case) -> None:
    """Asserts a case's result, and that every way of cutting its text gives the same events."""
    whole = run(parser_name, [case.text], case.tools)
    calls = calls_of(whole)
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == list(case.calls)
    assert text_of(whole) == case.content
    assert reasoning_of(whole) == case.reasoning
    if case.raw is not None:
        assert [arguments for _, _, arguments in calls] == list(case.raw)
    for pattern, (call_id, _, _) in zip(case.ids, calls, strict=bool(case.ids)):
        assert re.fullmatch(pattern, call_id)
    assert len({call_id for call_id, _, _ in calls}) == len(calls)
    assert run(parser_name, case.text, case.tools) == whole
    source = random.Random(case.id)
    for _ in range(NUM_RANDOM_SPLITS):
        pieces = random_pieces(case.text, source)
        assert run(parser_name, pieces, case.tools) == whole, pieces


def table(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Runs a test over each case; a table holds 15 at least."""
    assert len(cases) >= 15
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases])
