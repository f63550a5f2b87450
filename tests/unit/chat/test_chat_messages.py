"""How messages are brought into the form that a template wants."""

from __future__ import annotations

from typing import Any

import pytest

from mlxd.chat.messages import MessageStyle, prepare_messages
from mlxd.errors import InvalidRequestError

STRINGS = MessageStyle(string_roles=frozenset({"system", "user", "assistant", "tool"}))
PARTS = MessageStyle(part_roles=frozenset({"user"}))


def prepare(style: MessageStyle = STRINGS, /, **message: Any) -> dict[str, Any]:
    (prepared,) = prepare_messages([{"role": "user", **message}], style)
    return prepared


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def arguments(style: MessageStyle, value: Any) -> Any:
    return prepare(style, role="assistant", tool_calls=[call(value)])["tool_calls"][0]["function"][
        "arguments"
    ]


def test_nulls_are_left_out_and_the_rest_is_kept() -> None:
    assert prepare(content="a", name=None, x=1) == {"role": "user", "content": "a", "x": 1}


def test_parts_become_a_string_where_the_template_takes_only_strings() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    assert prepare(content=content)["content"] == "a\nb\nc"
    assert prepare(role="assistant", content=[{"type": "refusal", "refusal": "no"}])["content"] == "no"
    assert prepare(content=[])["content"] == ""


def test_parts_are_normalised_where_the_template_takes_them() -> None:
    content = [
        {"type": "input_text", "text": "a", "cache_control": {}},
        {"type": "image_url", "image_url": {}},
    ]
    expected = [{"type": "text", "text": "a"}, {"type": "image", "image_url": {}}]
    assert prepare(PARTS, content=content)["content"] == expected


def test_a_string_becomes_a_part_only_where_the_template_takes_no_strings() -> None:
    both = MessageStyle(part_roles=PARTS.part_roles, string_roles=PARTS.part_roles)
    assert prepare(PARTS, content="a")["content"] == [{"type": "text", "text": "a"}]
    assert prepare(both, content="a")["content"] == "a"
    assert prepare(PARTS, role="assistant", content="a")["content"] == "a"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "text only, not content of type 'image_url'"),
        ({"type": "text"}, "must have 'text'"),
        ({"text": "a"}, "an object with a type"),
        (3, "an object with a type"),
    ],
)
def test_content_that_is_no_text(part: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        prepare(content=[part])
    assert error.value.param == "messages"


def test_arguments_are_objects_or_text_as_the_template_wants() -> None:
    strings = MessageStyle(argument_strings=True)
    assert arguments(STRINGS, '{"a": "é"}') == {"a": "é"}
    assert arguments(STRINGS, {"a": 1}) == {"a": 1}
    assert arguments(STRINGS, "") == arguments(STRINGS, None) == {}
    assert arguments(strings, {"a": "é"}) == '{"a": "é"}'
    assert arguments(strings, '{"a":1}') == '{"a":1}'
    assert arguments(strings, None) == "{}"


@pytest.mark.parametrize("slip", ['{"a": ', "[1]", '"a"', "3", '{"a":' * 100_000])
def test_arguments_that_are_no_object_are_kept_as_they_are(slip: str) -> None:
    assert arguments(STRINGS, slip) == slip


@pytest.mark.parametrize("calls", [[3], [{"id": "x"}], "x"])
def test_tool_calls_of_no_known_shape_are_the_templates_matter(calls: Any) -> None:
    assert prepare(role="assistant", tool_calls=calls)["tool_calls"] == calls


def test_developers_are_the_system_to_templates_that_do_not_know_them() -> None:
    assert prepare(role="developer", content="a")["role"] == "system"
    assert prepare(MessageStyle(developer_role=True), role="developer", content="a")["role"] == "developer"


def test_reasoning_has_all_its_names() -> None:
    prepared = prepare(role="assistant", content="a", reasoning="r")
    assert (prepared["reasoning"], prepared["reasoning_content"], prepared["thinking"]) == ("r", "r", "r")
    prepared = prepare(role="assistant", content="a", reasoning_content="r", thinking="t")
    assert (prepared["reasoning_content"], prepared["thinking"]) == ("r", "t")


def test_the_clients_messages_are_not_touched() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}], "tool_calls": [call("{}")]}
    (prepared,) = prepare_messages([message], PARTS)
    prepared["content"][0]["text"] = "b"
    prepared["tool_calls"][0]["function"]["arguments"]["x"] = 1
    assert message == {"role": "user", "content": [{"type": "text", "text": "a"}], "tool_calls": [call("{}")]}
