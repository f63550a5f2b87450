"""Several requests in flight on one connection: order, bounds, and what ends what."""

from __future__ import annotations

from tests.wire.harness import Puppet, Recorder, Split, Wire, in_loop, settle


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()


def post(path: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@in_loop
async def test_answers_come_in_order(split: Split) -> None:
    app = Puppet()
    wire = Wire(app, split=split)
    await wire.send(get("/1") + post("/2", b"two") + get("/3"))
    for number in (1, 2, 3):
        assert [call.scope["path"] for call in app.calls] == [f"/{n}" for n in range(1, number + 1)]
        call = app.calls[-1]
        assert (await call.receive())["body"] == (b"two" if number == 2 else b"")
        await call.respond(b"%d" % number)
    assert [r.body for r in wire.responses()] == [b"1", b"2", b"3"]
    assert not wire.ended
    await wire.end()


@in_loop
async def test_a_full_queue_stops_the_reading(split: Split) -> None:
    app = Puppet()
    wire = Wire(app, split=split, max_pipelined_requests=2)
    await wire.send(b"".join(get(f"/{n}") for n in range(10)))
    assert len(wire.connection.queue) == 2
    assert not wire.transport.reading
    for n in range(10):
        assert len(wire.connection.queue) <= 2
        await app.calls[n].respond(b"%d" % n)
    assert [r.body for r in wire.responses()] == [b"%d" % n for n in range(10)]
    assert wire.transport.reading
    await wire.end()


@in_loop
async def test_bytes_that_come_while_the_queue_is_full_are_kept() -> None:
    app = Puppet()
    wire = Wire(app, max_pipelined_requests=1)
    requests = b"".join(get(f"/{n}") for n in range(6))
    wire.connection.data_received(requests[:100])
    wire.connection.data_received(requests[100:])  # a transport may have read more before it paused
    await settle()
    for n in range(6):
        await app.calls[n].respond(b"%d" % n)
    assert [r.body for r in wire.responses()] == [b"%d" % n for n in range(6)]
    await wire.end()


@in_loop
async def test_a_body_behind_a_running_request_is_bounded() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(get("/1") + b"POST /2 HTTP/1.1\r\nHost: h\r\nContent-Length: 400000\r\n\r\n")
    wire.split = lambda data: [data[i : i + 50_000] for i in range(0, len(data), 50_000)]
    await wire.send(b"x" * 400_000)
    assert not wire.transport.reading
    assert wire.connection.receiving is not None
    assert wire.connection.receiving.body_bytes_buffered == 100_000
    await app.calls[0].respond(b"1")
    size = 0
    while size < 400_000:
        size += len((await app.calls[1].receive())["body"])
        await settle()
    await app.calls[1].respond(b"2")
    assert [r.body for r in wire.responses()] == [b"1", b"2"]
    await wire.end()


@in_loop
async def test_a_malformed_request_is_answered_in_its_turn(split: Split) -> None:
    app = Puppet()
    wire = Wire(app, split=split)
    await wire.send(get("/1") + get("/2") + b"GET / HTTP/1.1\r\n\r\n" + get("/4"))
    assert wire.output == b""
    await app.calls[0].respond(b"1")
    await app.calls[1].respond(b"2")
    assert [r.status for r in wire.responses()] == [200, 200, 400]
    assert len(app.calls) == 2 and wire.ended
    await wire.end()


@in_loop
async def test_a_malformed_body_behind_a_running_request(split: Split) -> None:
    """Its application has not been called, and never will be."""
    app = Puppet()
    wire = Wire(app, split=split)
    await wire.send(get("/1") + b"POST /2 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
    await app.calls[0].respond(b"1")
    assert [r.status for r in wire.responses()] == [200, 400]
    assert len(app.calls) == 1
    await wire.end()


@in_loop
async def test_a_closing_answer_drops_what_follows() -> None:
    app = Recorder(headers=[(b"connection", b"close")])
    wire = Wire(app)
    await wire.send(get("/1") + get("/2") + b"GET / HTTP/1.1\r\n\r\n")
    assert [r.status for r in wire.responses()] == [200]
    assert len(app.scopes) == 1
    await wire.end()


@in_loop
async def test_the_next_request_does_not_wait_for_the_application_to_return() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(get("/1") + get("/2"))
    await app.calls[0].start()
    await app.calls[0].body(b"1")
    await settle()
    assert len(app.calls) == 2
    await app.calls[1].respond(b"2")
    assert len(wire.context.exchanges) == 1
    await app.calls[0].finish()
    assert [r.body for r in wire.responses()] == [b"1", b"2"]
    await wire.end()
