"""Three faults that another server of this kind has had (STYLE's uvicorn row)."""

from __future__ import annotations

import pytest

from mlxd.server.asgi import ClientDisconnected
from tests.wire.harness import DATE, SERVER, Puppet, Recorder, Split, Wire, in_loop, settle


@pytest.mark.parametrize("connection", [b"", b"Connection: keep-alive\r\n"])
@in_loop
async def test_http_1_0_never_gets_chunks(split: Split, connection: bytes) -> None:
    app = Puppet()
    wire = Wire(app, split=split)
    await wire.send(b"GET /stream HTTP/1.0\r\n" + connection + b"\r\n")
    call = app.calls[0]
    await call.start()
    await call.body(b"one ", more=True)
    await call.body(b"", more=True)
    await call.body(b"two", more=True)
    await call.body(b"")
    await call.finish()
    # No length is known and there are no chunks: the end of the connection is the end of the body.
    assert wire.output == b"HTTP/1.1 200 OK\r\n" + DATE + SERVER + b"connection: close\r\n\r\none two"
    assert wire.transport.closed and not wire.transport.aborted
    await wire.end()


@in_loop
async def test_trailers_stay_out_of_the_headers(split: Split) -> None:
    app = Recorder()
    wire = Wire(app, split=split)
    request = (
        b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: x-admin\r\n\r\n"
        b"3\r\nabc\r\n0\r\nX-Admin: yes\r\nAuthorization: Bearer x\r\nHost: other\r\n\r\n"
    )
    await wire.send(request)
    await wire.send(b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n")
    assert app.bodies == [b"abc", b""]
    assert app.scopes[0]["headers"] == [
        (b"host", b"h"),
        (b"transfer-encoding", b"chunked"),
        (b"trailer", b"x-admin"),
    ]
    assert app.scopes[1]["headers"] == [(b"host", b"h")]
    assert [r.status for r in wire.responses()] == [200, 200]
    await wire.end()


@pytest.mark.parametrize("how", ["lost", "eof"])
@in_loop
async def test_the_running_exchange_hears_of_a_disconnect_behind_pipelined_requests(
    split: Split, how: str
) -> None:
    app = Puppet()
    wire = Wire(app, split=split)
    await wire.send(b"GET /1 HTTP/1.1\r\nHost: h\r\n\r\n" + b"GET /2 HTTP/1.1\r\nHost: h\r\n\r\n" * 2)
    [call] = app.calls
    assert (await call.receive())["type"] == "http.request"
    waiting = call.receiving()
    await settle()
    assert not waiting.done()
    await (wire.eof() if how == "eof" else wire.lose())
    assert await waiting == {"type": "http.disconnect"}
    with pytest.raises(ClientDisconnected):
        await call.start()
    await call.finish()
    assert len(app.calls) == 1, "nobody waits for the requests behind it"
    assert not wire.context.connections and not wire.context.exchanges
