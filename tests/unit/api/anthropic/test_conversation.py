"""Anthropic's turns as messages for a template."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mlxd.api.anthropic.conversation import continues_answer, marks_cache_points, template_messages
from mlxd.api.anthropic.schema import CountTokensRequest
from mlxd.errors import InvalidRequestError


def fields(*messages: Any, **others: Any) -> CountTokensRequest:
    return msgspec.convert({"model": "m", "messages": messages, **others}, CountTokensRequest)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {**user(*content), "role": "assistant"}


def text(value: str, **others: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **others}


def use(id: str, **input: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": f"f_{id}", "input": input}


def result(id: str, content: Any = None, **others: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **others}


def call(id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": f"f_{id}", "arguments": arguments}}


def tool(id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "name": f"f_{id}", "content": content}


HI = {"role": "user", "content": "Hi"}

TURNS: list[tuple[list[Any], list[Any]]] = [
    ([user("Hi")], [HI]),
    ([user(text("Hi", cache_control={"type": "ephemeral"}))], [HI]),
    ([user(text("a"), text("b"))], [{"role": "user", "content": "a\nb"}]),
    ([user("a"), user(text("b"))], [{"role": "user", "content": "a\nb"}]),
    ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
    (
        [user("a"), assistant("b"), {"role": "system", "content": "c"}, user("d")],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "system", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    ),
    (
        [user("Hi"), assistant(text("well"), use("1", x=1)), assistant(use("2"))],
        [HI, {"role": "assistant", "content": "well", "tool_calls": [call("1", x=1), call("2")]}],
    ),
    (
        [user("Hi"), assistant({"type": "tool_use", "id": "1", "name": "f_1", "input": None})],
        [HI, {"role": "assistant", "content": "", "tool_calls": [call("1")]}],
    ),
    (
        [
            user("Hi"),
            assistant(
                {"type": "thinking", "thinking": "a", "signature": "s"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "thinking", "thinking": "b", "signature": "s"},
                text("c"),
            ),
        ],
        [HI, {"role": "assistant", "content": "c", "reasoning_content": "a\nb"}],
    ),
    (
        [user("Hi"), assistant({"type": "thinking", "thinking": "", "signature": "s"}, text("c"))],
        [HI, {"role": "assistant", "content": "c"}],
    ),
    (
        # Results go before the text of their turn, wherever they stand in it.
        [
            user("Hi"),
            assistant(use("1"), use("2")),
            user(text("so?"), result("1", "one"), result("2", [text("t"), text("wo")])),
            user("go on"),
        ],
        [
            HI,
            {"role": "assistant", "content": "", "tool_calls": [call("1"), call("2")]},
            tool("1", "one"),
            tool("2", "t\nwo"),
            {"role": "user", "content": "so?\ngo on"},
        ],
    ),
    (
        [user("Hi"), assistant(use("1")), user(result("1", "no file", is_error=True))],
        [HI, {"role": "assistant", "content": "", "tool_calls": [call("1")]}, tool("1", "Error: no file")],
    ),
    (
        [user("Hi"), assistant(use("1")), user(result("1", is_error=False))],
        [HI, {"role": "assistant", "content": "", "tool_calls": [call("1")]}, tool("1", "")],
    ),
    ([user(result("gone", "x"))], [{"role": "tool", "tool_call_id": "gone", "content": "x"}]),
]


@pytest.mark.parametrize(("turns", "messages"), TURNS)
def test_turns(turns: list[Any], messages: list[Any]) -> None:
    assert template_messages(fields(*turns)) == messages


@pytest.mark.parametrize(
    ("system", "text_of_it"),
    [
        ("Be brief.", "Be brief."),
        ([text("Be"), text("brief.", cache_control={"type": "ephemeral"})], "Be\nbrief."),
        ("x-anthropic-billing-header: cch=1;\nBe brief.", "Be brief."),
        ([text("x-anthropic-billing-header: cc_version=2; cch=ab12;"), text("Be brief.")], "Be brief."),
        ([text("X-Anthropic-Billing-Header: a\nBe"), text("brief.")], "Be\nbrief."),
        ("Mind x-anthropic-billing-header: a", "Mind x-anthropic-billing-header: a"),
        ([text("a"), text("x-anthropic-billing-header: b")], "a\nx-anthropic-billing-header: b"),
    ],
)
def test_system(system: Any, text_of_it: str) -> None:
    assert template_messages(fields(HI, system=system)) == [{"role": "system", "content": text_of_it}, HI]


@pytest.mark.parametrize("system", [None, "", [], [text("")], "x-anthropic-billing-header: a"])
def test_no_system(system: Any) -> None:
    assert template_messages(fields(HI, system=system)) == [HI]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
PDF = {"type": "document", "source": {"type": "url", "url": "https://x.example/a.pdf"}}


@pytest.mark.parametrize(
    ("turns", "param", "problem"),
    [
        ([], "messages", "at least one"),
        ([user(text("a"), IMAGE)], "messages[0].content[1]", "text only, not content of type 'image'"),
        ([user("a"), user(PDF)], "messages[1].content[0]", "text only, not content of type 'document'"),
        ([user(result("1", [text("a"), IMAGE]))], "messages[0].content[0].content[1]", "'image'"),
        ([user(use("1"))], "messages[0].content[0]", "no place for 'tool_use'"),
        ([user({"type": "thinking", "thinking": "a"})], "messages[0].content[0]", "'thinking'"),
        ([HI, assistant(result("1"))], "messages[1].content[0]", "no place for 'tool_result'"),
        ([{"role": "system", "content": [use("1")]}], "messages[0].content[0]", "of role system"),
    ],
)
def test_refused(turns: list[Any], param: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        template_messages(fields(*turns))
    assert caught.value.param == param


def test_a_last_message_of_the_assistants_is_continued() -> None:
    assert continues_answer(fields(HI, assistant("The answer")))
    assert continues_answer(fields(HI, assistant(text("The answer"))))
    assert not continues_answer(fields(HI, assistant("The answer"), HI))
    with pytest.raises(InvalidRequestError, match="tool_result"):
        continues_answer(fields(HI, assistant(text("a"), use("1"))))
    with pytest.raises(InvalidRequestError, match="tool_result"):  # one turn
        continues_answer(fields(HI, assistant(use("1")), assistant("so")))


MARK = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("turns", "others", "marked"),
    [
        ([user("a")], {}, False),
        ([user(text("a")), assistant(use("1")), user(result("1", [text("a")]))], {}, False),
        ([user("a")], {"system": [text("s")], "tools": [{"name": "f"}]}, False),
        ([user("a")], MARK, True),
        ([user("a")], {"system": [text("s", **MARK)]}, True),
        ([user("a")], {"tools": [{"name": "f", **MARK}]}, True),
        ([user(text("a", **MARK))], {}, True),
        ([user(result("1", "x", **MARK))], {}, True),
        ([user(result("1", [text("x", **MARK)]))], {}, True),
    ],
)
def test_cache_marks(turns: list[Any], others: dict[str, Any], marked: bool) -> None:
    assert marks_cache_points(fields(*turns, **others)) is marked
