"""However a byte stream is cut into reads, the requests and the answers are the same."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.harness import Recorder, Wire

BODIES = st.binary(max_size=40) | st.sampled_from([b"\r\n\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
ODD = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1, 1\r\n\r\n",
    b"GET /last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    b"POST /up HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: x\r\nContent-Length: 2\r\n\r\nab",
]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    number = draw(st.integers(0, 9))
    body = draw(BODIES)
    kind = draw(st.sampled_from(["get", "sized", "chunked", "odd"]))
    if kind == "odd":
        return draw(st.sampled_from(ODD))
    if kind == "get":
        return b"GET /%d?q HTTP/1.1\r\nHost: h\r\n\r\n" % number
    head = b"POST /%d HTTP/1.1\r\nHost: h\r\n" % number
    if kind == "sized":
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    at = draw(st.integers(0, len(body)))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:at], body[at:]) if part)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nT: v\r\n\r\n"


@given(st.lists(requests(), min_size=1, max_size=5), st.lists(st.integers(1, 60), max_size=30))
@settings(deadline=None, max_examples=60)
def test_any_split_gives_the_same(stream: list[bytes], sizes: list[int]) -> None:
    data = b"".join(stream)

    def split(data: bytes) -> list[bytes]:
        pieces, offset = [], 0
        for size in sizes:
            pieces.append(data[offset : offset + size])
            offset += size
        return [piece for piece in (*pieces, data[offset:]) if piece]

    async def one_by_one() -> tuple[object, ...]:
        return await exchange(lambda data: stream)

    async def cut() -> tuple[object, ...]:
        return await exchange(split)

    async def exchange(split: object) -> tuple[object, ...]:
        app = Recorder()
        wire = Wire(app, split=split, max_pipelined_requests=2)  # type: ignore[arg-type]
        await wire.send(data)
        seen = [(scope["raw_path"], body) for scope, body in zip(app.scopes, app.bodies, strict=True)]
        statuses = [response.status for response in wire.responses()]
        result = (seen, statuses, wire.ended)
        await wire.end()
        return result

    assert asyncio.run(cut()) == asyncio.run(one_by_one())
