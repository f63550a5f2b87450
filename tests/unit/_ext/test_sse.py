"""Frames and escaping by example; extension and twin alike."""

from __future__ import annotations

from types import ModuleType

import pytest

from mlxd._ext import sse as extension
from tests.reference import sse as twin


@pytest.fixture(params=[extension, twin], ids=["extension", "twin"])
def sse(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("", b""),
        ("plain / ASCII\x7f", b"plain / ASCII\x7f"),
        ('"\\', rb"\"\\"),
        ("\b\f\n\r\t", rb"\b\f\n\r\t"),
        ("\x00\x0b\x1f", rb"\u0000\u000b\u001f"),
        ("\x80é\u07ff", b"\xc2\x80\xc3\xa9\xdf\xbf"),
        ("\u0800\u2028\u2029\uffff", b"\xe0\xa0\x80\xe2\x80\xa8\xe2\x80\xa9\xef\xbf\xbf"),
        ("\U00010000😀\U0010ffff", b"\xf0\x90\x80\x80\xf0\x9f\x98\x80\xf4\x8f\xbf\xbf"),
        ("\ud7ff\ud800\udbff\udc00\udfff\ue000", b"\xed\x9f\xbf\\ud800\\udbff\\udc00\\udfff\xee\x80\x80"),
        ("ÿ\n", b"\xc3\xbf\\n"),
    ],
)
def test_escape_json(sse: ModuleType, text: str, escaped: bytes) -> None:
    assert sse.escape_json(text) == escaped


def test_frames(sse: ModuleType) -> None:
    assert sse.DONE == b"data: [DONE]\n\n"
    assert sse.frame(b"{}") == b"data: {}\n\n"
    assert sse.event_frame("ping", b"{}") == b"event: ping\ndata: {}\n\n"
    assert sse.event_frame(b"ping", b"{}") == b"event: ping\ndata: {}\n\n"


def test_text_frame(sse: ModuleType) -> None:
    chat = sse.TextFrame(b'{"delta":{"content":"', b'"}}')
    assert chat.encode("") == b'data: {"delta":{"content":""}}\n\n'
    assert chat.encode('Say "hé"\n') == b'data: {"delta":{"content":"Say \\"h\xc3\xa9\\"\\n"}}\n\n'
    assert chat.encode("ok") == b'data: {"delta":{"content":"ok"}}\n\n'


@pytest.mark.parametrize("broken", [b"a\nb", b"a\rb", b"\n", b"a\r\n"])
def test_a_line_break_would_forge_an_event(sse: ModuleType, broken: bytes) -> None:
    calls = (
        lambda: sse.frame(broken),
        lambda: sse.event_frame("x", broken),
        lambda: sse.event_frame(broken, b"{}"),
        lambda: sse.event_frame(broken.decode(), b"{}"),
        lambda: sse.TextFrame(broken, b""),
        lambda: sse.TextFrame(b"", broken),
    )
    for call in calls:
        with pytest.raises(ValueError, match="line break"):
            call()


def test_wrong_types_are_refused() -> None:
    text_frame = extension.TextFrame(b"", b"")
    calls = (
        lambda: extension.escape_json(b"bytes"),
        lambda: extension.escape_json(None),
        lambda: extension.frame("text"),
        lambda: extension.frame(None),
        lambda: extension.event_frame(None, b"{}"),
        lambda: extension.event_frame("x", None),
        lambda: extension.TextFrame("text", b""),
        lambda: extension.TextFrame(b"", None),
        lambda: text_frame.encode(b"bytes"),
        lambda: text_frame.encode(None),
    )
    for call in calls:
        with pytest.raises(TypeError):
            call()
