"""Any text: its frame is one event, whose JSON holds that text.

It does not know how the escaping is done; JSON parsers and a reader of event streams judge it.
"""

from __future__ import annotations

import json
import re
from types import ModuleType

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import given

from mlxd._ext import sse as extension
from tests.reference import sse as twin

SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

characters = st.one_of(
    st.characters(),
    st.characters(categories=["Cs"]),
    st.sampled_from(
        '"\\/\x00\x08\t\n\x0b\x0c\r\x1f\x7f\x80\u07ff\u0800\u2028\u2029\ud7ff\ue000\uffff\U00010000'
    ),
)
texts = st.text(characters)
json_bytes = st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=3).map(orjson.dumps)

both = pytest.mark.parametrize("sse", [extension, twin], ids=["extension", "twin"])


def read_events(stream: bytes) -> list[tuple[str | None, str]]:
    """(event, data) of each event, as a browser reads them (WHATWG HTML, 9.2.6)."""
    events = []
    fields: dict[str, str] = {}
    for line in re.split("\r\n|\n|\r", stream.decode()):
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif fields:
            events.append((fields.get("event"), fields["data"]))
            fields = {}
    assert not fields
    return events


@both
@given(text=texts)
def test_json_parsers_read_the_text_back(sse: ModuleType, text: str) -> None:
    quoted = b'"%b"' % sse.escape_json(text)
    assert json.loads(quoted) == json.loads(json.dumps(text))
    if not SURROGATE_PAIR.search(text):
        assert json.loads(quoted) == text
    if not re.search("[\ud800-\udfff]", text):
        assert orjson.loads(quoted) == text


@both
@given(text=texts)
def test_only_what_must_be_escaped_is(sse: ModuleType, text: str) -> None:
    escaped = sse.escape_json(text).decode("utf-8", "strict")
    plain = "".join(re.findall(r'[^\x00-\x1f"\\\ud800-\udfff]', text))
    assert re.sub(r'\\(u[0-9a-f]{4}|["\\bfnrt])', "", escaped) == plain


@given(text=texts)
def test_extension_and_twin_agree(text: str) -> None:
    assert extension.escape_json(text) == twin.escape_json(text)


@both
@given(prefix=json_bytes, suffix=json_bytes, deltas=st.lists(texts, max_size=4))
def test_each_delta_is_one_event(sse: ModuleType, prefix: bytes, suffix: bytes, deltas: list[str]) -> None:
    text_frame = sse.TextFrame(b'{"before":' + prefix + b',"content":"', b'","after":' + suffix + b"}")
    events = read_events(b"".join(map(text_frame.encode, deltas)) + sse.DONE)
    assert events.pop() == (None, "[DONE]")
    assert [event for event, _ in events] == [None] * len(deltas)
    assert [json.loads(data) for _, data in events] == [
        {"before": json.loads(prefix), "content": json.loads(json.dumps(delta)), "after": json.loads(suffix)}
        for delta in deltas
    ]


@both
@given(name=st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1), body=json_bytes)
def test_event_frames(sse: ModuleType, name: str, body: bytes) -> None:
    assert sse.event_frame(name, body) == sse.event_frame(name.encode(), body)
    stream = sse.event_frame(name, body) + sse.frame(body)
    assert read_events(stream) == [(name, body.decode()), (None, body.decode())]
