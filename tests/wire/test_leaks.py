"""Nothing is left of a connection or an exchange once it is over, without the help of the collector."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator

import pytest

from mlxd.server.exchange import Exchange
from tests.wire.harness import Puppet, Recorder, Split, Wire, in_loop, settle

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class Watch:
    """Remembers what it has seen, weakly."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.connection = weakref.ref(wire.connection)
        self.exchanges: weakref.WeakSet[Exchange] = weakref.WeakSet()

    def look(self) -> None:
        connection = self.wire.connection
        for exchange in (connection.active, connection.receiving, *connection.queue):
            if exchange is not None:
                self.exchanges.add(exchange)

    def assert_gone(self) -> None:
        context = self.wire.context
        assert not context.connections and not context.exchanges
        del self.wire.connection
        del self.wire.transport.protocol
        assert self.connection() is None
        assert not list(self.exchanges)


@in_loop
async def test_after_a_normal_end(split: Split) -> None:
    app = Puppet()
    wire = Wire(app, split=split)
    watch = Watch(wire)
    for _ in range(3):
        await wire.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab")
        watch.look()
        assert len(watch.exchanges) == 1, "exchanges do not pile up on a kept connection"
        await app.calls[-1].respond(b"ok")
        app.calls.clear()
    assert not list(watch.exchanges)
    await wire.lose()
    watch.assert_gone()


@pytest.mark.parametrize("order", ["client first", "application first"])
@in_loop
async def test_after_a_cut_stream_with_pipelined_requests(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Puppet()
    wire = Wire(app)
    watch = Watch(wire)
    await wire.send(GET * 4)
    watch.look()
    assert len(watch.exchanges) == 4
    await app.calls[0].start()
    await app.calls[0].body(b"part", more=True)
    if order == "client first":
        await wire.lose()
        await app.calls[0].finish()
    else:
        # pytest keeps log records, and with them the traceback's frames.
        monkeypatch.setattr(logging.getLogger("mlxd.server"), "disabled", True)
        await app.calls[0].finish()
    app.calls.clear()
    await settle()
    watch.assert_gone()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        GET + b"nonsense",
        GET + b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Length: 3\r\n\r\nab",
    ],
)
@in_loop
async def test_after_refusals(split: Split, request_bytes: bytes) -> None:
    wire = Wire(Recorder(), split=split)
    watch = Watch(wire)
    await wire.send(request_bytes)
    watch.look()
    await wire.lose()
    watch.assert_gone()


@in_loop
async def test_after_an_abort_in_mid_body() -> None:
    app = Puppet()
    wire = Wire(app)
    watch = Watch(wire)
    await wire.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 200000\r\n\r\n" + b"x" * 100_000)
    watch.look()
    wire.connection.abort()
    await settle()
    assert (await app.calls[0].receive())["type"] == "http.disconnect"
    await app.calls[0].finish()
    app.calls.clear()
    watch.assert_gone()
