"""Events into content blocks: the same ones in a stream and in a whole answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.api.anthropic.blocks import SIGNATURE, BlockSplitter, ThinkingDisplay, whole_blocks
from mlxd.api.anthropic.frames import MessageFrames
from mlxd.api.anthropic.message import MessageHead
from mlxd.chat.pipeline import OutputPipeline
from mlxd.chat.types import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from mlxd.engine.request import FinishReason, RequestOutput
from tests.unit.api.anthropic.events import assembled, read_events

HEAD = MessageHead(id="msg_1", request_id="r", model="m", num_prompt_tokens=10, marks_cache_points=False)


class ScriptedPipeline(OutputPipeline):
    """Gives one list of events for each output, the last one at the end."""

    def __init__(self, steps: list[list[Event]]) -> None:
        super().__init__()
        *self.steps, self.rest = steps

    def feed(self, text: str) -> list[Event]:
        return self.steps.pop(0) if self.steps else []

    def finish(self) -> list[Event]:
        return self.rest


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def thinking_block(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": SIGNATURE}


def tool_block(id: str, name: str, **input: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def streamed(steps: list[list[Event]], display: ThinkingDisplay) -> list[dict[str, Any]]:
    frames = MessageFrames(HEAD, ScriptedPipeline([*steps, []]), BlockSplitter(display))
    outputs = [RequestOutput(0, "x", [1]) for _ in steps]
    last = RequestOutput(0, "", [2], finish_reason=FinishReason.STOP, num_output_tokens=3)
    body = b"".join(frames.render([output]) for output in [*outputs, last])
    content: list[dict[str, Any]] = assembled(read_events(frames.start() + body + frames.end()))["content"]
    return content


CASES: list[tuple[list[Event], list[dict[str, Any]]]] = [
    ([], [text_block("")]),
    ([TextDelta("a"), TextDelta("b")], [text_block("ab")]),
    ([ReasoningDelta("h"), ReasoningDelta("m"), TextDelta("x")], [thinking_block("hm"), text_block("x")]),
    ([ReasoningDelta("hm")], [thinking_block("hm")]),
    (
        [ToolCallStart(0, "c0", "f"), ToolCallDelta(0, '{"a":'), ToolCallDelta(0, "1}")],
        [tool_block("c0", "f", a=1)],
    ),
    ([ToolCallStart(0, "c0", "f")], [tool_block("c0", "f")]),
    (
        [
            TextDelta("t"),
            ToolCallStart(0, "c0", "f"),
            ToolCallDelta(0, "{}"),
            ToolCallStart(1, "c1", "f"),
            ToolCallDelta(1, '{"b": "\u2028"}'),
            TextDelta("u"),
        ],
        [text_block("t"), tool_block("c0", "f"), tool_block("c1", "f", b="\u2028"), text_block("u")],
    ),
    (
        [ReasoningDelta("a"), TextDelta("b"), ReasoningDelta("c"), TextDelta("d")],
        [thinking_block("a"), text_block("b"), thinking_block("c"), text_block("d")],
    ),
    ([TextDelta("a"), Finished(FinishReason.STOP)], [text_block("a")]),
]


@pytest.mark.parametrize(("events", "content"), CASES)
def test_blocks(events: list[Event], content: list[dict[str, Any]]) -> None:
    assert whole_blocks(events, BlockSplitter()) == content
    assert streamed([[event] for event in events], ThinkingDisplay.SHOWN) == content
    assert streamed([events], ThinkingDisplay.SHOWN) == content


@pytest.mark.parametrize(
    ("display", "content"),
    [
        (ThinkingDisplay.OMITTED, [thinking_block(""), text_block("b")]),
        (ThinkingDisplay.HIDDEN, [text_block("b")]),
    ],
)
def test_thinking_that_is_not_to_be_seen(display: ThinkingDisplay, content: list[dict[str, Any]]) -> None:
    events: list[Event] = [ReasoningDelta("a"), TextDelta("b")]
    assert whole_blocks(events, BlockSplitter(display)) == content
    assert streamed([events], display) == content


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "nonsense"])
def test_input_that_is_no_object_is_not_lost(arguments: str) -> None:
    events: list[Event] = [ToolCallStart(0, "c", "f"), ToolCallDelta(0, arguments)]
    assert whole_blocks(events, BlockSplitter()) == [tool_block("c", "f", INVALID_JSON=arguments)]


texts = st.text(min_size=1, max_size=5)
some_events = st.lists(
    st.one_of(
        st.builds(TextDelta, texts),
        st.builds(ReasoningDelta, texts),
        st.builds(ToolCallStart, st.just(0), texts, texts),
    ),
    max_size=8,
)


@given(steps=st.lists(some_events, max_size=4), display=st.sampled_from(ThinkingDisplay))
def test_a_stream_is_the_whole(steps: list[list[Event]], display: ThinkingDisplay) -> None:
    events = [event for step in steps for event in step]
    assert streamed(steps, display) == whole_blocks(events, BlockSplitter(display))


def test_only_a_call_that_was_made_counts() -> None:
    splitter = BlockSplitter()
    splitter.place(TextDelta("a"))
    assert not splitter.has_calls
    splitter.place(ToolCallStart(0, "c", "f"))
    assert splitter.has_calls
