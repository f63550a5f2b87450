"""The rules that httptools' parser has too: a head is safe whatever parser feeds it."""

from __future__ import annotations

import pytest

from mlxd.config import ServerConfig
from mlxd.errors import RequestError
from mlxd.server.request import RequestHead, split_target


def head(*headers: tuple[bytes, bytes]) -> RequestHead:
    head = RequestHead(ServerConfig())
    head.add_target(b"POST", b"/")
    for name, value in ((b"Host", b"h"), *headers):
        head.add_header(name, value)
    head.finish("1.1")
    return head


LENGTH, CODING = b"Content-Length", b"Transfer-Encoding"


@pytest.mark.parametrize(
    "headers",
    [
        [(LENGTH, b"3"), (CODING, b"chunked")],
        [(CODING, b"chunked"), (LENGTH, b"3")],
        [(LENGTH, b"3"), (LENGTH, b"3")],
        [(LENGTH, b"+3")],
        [(LENGTH, b"-3")],
        [(LENGTH, b"3,3")],
        [(LENGTH, b"0x3")],
        [(LENGTH, b"")],
        [(LENGTH, b"\xb2")],
        [(LENGTH, b"9" * 5000)],
        [(CODING, b"chunked"), (CODING, b"chunked")],
        [(CODING, b"identity")],
        [(CODING, b"chunked, chunked")],
        [(CODING, b"")],
    ],
)
def test_doubtful_framing_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(RequestError) as caught:
        head(*headers)
    assert caught.value.status in (400, 501)


def test_clear_framing() -> None:
    assert (head().has_body, head().content_length) == (False, 0)
    sized = head((LENGTH, b"007"))
    assert (sized.has_body, sized.content_length, sized.chunked) == (True, 7, False)
    chunked = head((CODING, b"CHUNKED"))
    assert (chunked.has_body, chunked.chunked) == (True, True)


def test_the_limit_of_headers_covers_trailers() -> None:
    complete = head()
    for _ in range(ServerConfig().max_header_count - 1):
        complete.add_header(b"X", b"y")
    assert complete.headers == [(b"host", b"h")]
    with pytest.raises(RequestError) as caught:
        complete.add_header(b"X", b"y")
    assert caught.value.status == 431


def test_split_target() -> None:
    assert split_target(b"/a/b?c=d#e") == (b"/a/b", b"c=d")
    assert split_target(b"https://u@h:1?q") == (b"/", b"q")
    assert split_target(b"*") == (b"*", b"")
