"""From ASGI messages to bytes: framing, what the server adds, and what it does when the application fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable

import pytest

from mlxd.asgi_extensions import ACCESS_EXTENSION
from mlxd.server.asgi import ClientDisconnected
from mlxd.server.exchange import LARGE_PIECE_BYTES
from tests.wire.harness import DATE, SERVER, Puppet, Recorder, Wire, in_loop, settle

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
GET_1_0 = b"GET / HTTP/1.0\r\n\r\n"
GET_1_0_ALIVE = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"


async def stream(app: Puppet, *bodies: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    call = app.calls[-1]
    await call.start(headers=headers)
    for body in bodies[:-1]:
        await call.body(body, more=True)
    await call.body(bodies[-1])
    await call.finish()


@in_loop
async def test_a_stream_is_chunked_one_write_a_message() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    await stream(app, b"first", b"", b"x" * 300, b"last")
    assert wire.transport.writes == [
        b"HTTP/1.1 200 OK\r\n" + DATE + SERVER + b"transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n",
        b"12c\r\n" + b"x" * 300 + b"\r\n",
        b"4\r\nlast\r\n0\r\n\r\n",
    ]
    assert not wire.ended
    await wire.end()


@in_loop
async def test_a_large_body_is_not_copied_behind_its_head() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    body = b"x" * LARGE_PIECE_BYTES
    await app.calls[0].start(headers=[(b"content-length", str(len(body)).encode())])
    await app.calls[0].body(body)
    head, piece = wire.transport.writes
    assert head.endswith(b"content-length: %d\r\n\r\n" % len(body)) and piece is body
    await app.calls[0].finish()
    await wire.end()


@in_loop
async def test_the_head_waits_for_the_first_body_message() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    await app.calls[0].start()
    assert wire.output == b""
    await app.calls[0].body(b"", more=True)
    assert wire.output.endswith(b"transfer-encoding: chunked\r\n\r\n")
    await app.calls[0].body(b"")
    assert wire.output.endswith(b"\r\n\r\n0\r\n\r\n")
    await app.calls[0].finish()
    await wire.end()


@in_loop
async def test_a_sized_stream() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    await stream(app, b"ab", b"cd", b"", headers=[(b"content-length", b"4")])
    [response] = wire.responses()
    assert response.body == b"abcd" and response.complete
    assert b"transfer-encoding" not in response.headers
    await wire.end()


@pytest.mark.parametrize(
    ("request_bytes", "connection", "ended"),
    [
        (GET, None, False),
        (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", b"close", True),
        (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: x, Close\r\n\r\n", b"close", True),
        (GET_1_0, b"close", True),
        (GET_1_0_ALIVE, b"keep-alive", False),
    ],
)
@in_loop
async def test_keep_alive(request_bytes: bytes, connection: bytes | None, ended: bool) -> None:
    app = Recorder()
    wire = Wire(app)
    await wire.send(request_bytes)
    [response] = wire.responses()
    assert response.body == b"ok"
    assert response.headers.get(b"connection") == connection
    assert wire.ended is ended
    await wire.send(request_bytes)
    assert len(app.scopes) == (1 if ended else 2)
    await wire.end()


@in_loop
async def test_nothing_after_connection_close_is_a_request() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n" + GET)
    await wire.send(GET)
    await stream(app, b"ok")
    assert len(app.calls) == len(wire.responses()) == 1
    await wire.end()


@in_loop
async def test_the_application_may_close() -> None:
    app = Recorder(headers=[(b"Connection", b"Close")])
    wire = Wire(app)
    await wire.send(GET + GET)
    assert [r.headers[b"connection"] for r in wire.responses()] == [b"close"]
    assert wire.transport.closed
    await wire.end()


@in_loop
async def test_hop_by_hop_headers_are_the_servers() -> None:
    wire = Wire(Recorder(headers=[(b"connection", b"keep-alive"), (b"transfer-encoding", b"gzip")]))
    await wire.send(GET)
    [response] = wire.responses()
    assert set(response.headers) == {b"date", b"server", b"content-length"}
    await wire.end()


@in_loop
async def test_own_date_and_server_are_kept() -> None:
    wire = Wire(Recorder(headers=[(b"Date", b"then"), (b"Server", b"other")]))
    await wire.send(GET)
    [response] = wire.responses()
    assert (response.headers[b"date"], response.headers[b"server"]) == (b"then", b"other")
    await wire.end()


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@in_loop
async def test_head_has_no_body_and_keeps_the_connection(version: bytes) -> None:
    app = Recorder(body=b"hello")
    wire = Wire(app)
    head = b"HEAD / HTTP/" + version + b"\r\nHost: h\r\nConnection: keep-alive\r\n\r\n"
    await wire.send(head + head)
    one, two = wire.responses(heads=[0, 1])
    assert one.headers[b"content-length"] == two.headers[b"content-length"] == b"5"
    assert b"hello" not in wire.output
    assert not wire.ended
    await wire.end()


@pytest.mark.parametrize(("version", "coding"), [(b"1.1", b"chunked"), (b"1.0", None)])
@in_loop
async def test_head_of_a_stream(version: bytes, coding: bytes | None) -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(b"HEAD / HTTP/" + version + b"\r\nHost: h\r\n\r\n")
    await stream(app, b"one", b"two", b"")
    [response] = wire.responses(heads=[0])
    assert response.headers.get(b"transfer-encoding") == coding
    assert wire.output.endswith(b"\r\n\r\n")
    await wire.end()


@in_loop
async def test_head_with_a_length_and_no_body() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
    await stream(app, b"", headers=[(b"content-length", b"77")])
    assert wire.responses(heads=[0])[0].headers[b"content-length"] == b"77"
    assert not wire.ended
    await wire.end()


@pytest.mark.parametrize(
    ("status", "length", "expected"),
    [(204, b"0", None), (204, None, None), (304, b"9", b"9"), (304, None, None)],
)
@in_loop
async def test_no_body_by_status(status: int, length: bytes | None, expected: bytes | None) -> None:
    headers = [(b"content-length", length)] if length else []
    wire = Wire(Recorder(status=status, headers=headers, body=b"dropped"))
    await wire.send(GET + GET)
    responses = wire.responses()
    assert [r.status for r in responses] == [status, status]
    assert responses[0].headers.get(b"content-length") == expected
    assert b"transfer-encoding" not in responses[0].headers
    assert b"dropped" not in wire.output
    await wire.end()


@in_loop
async def test_a_status_nobody_knows() -> None:
    wire = Wire(Recorder(status=299))
    await wire.send(GET)
    assert wire.output.startswith(b"HTTP/1.1 299 \r\n")
    await wire.end()


def assert_500(wire: Wire, *, request_id: bytes = b"id-0") -> None:
    [response] = wire.responses()
    assert response.status == 500
    assert response.headers[b"connection"] == b"close"
    assert response.headers[b"x-request-id"] == request_id
    assert json.loads(response.body) == {
        "error": {
            "message": "Internal server error.",
            "type": "api_error",
            "param": None,
            "code": "internal_error",
        }
    }
    assert wire.transport.closed


@in_loop
async def test_an_exception_is_a_500_without_internals(caplog: pytest.LogCaptureFixture) -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    await app.calls[0].start(200, [(b"x-secret", b"1")])
    await app.calls[0].finish(ValueError("secret"))
    assert_500(wire)
    assert b"secret" not in wire.output
    assert "ValueError: secret" in caplog.text and "id-0" in caplog.text
    await wire.end()


@pytest.mark.parametrize(
    ("sent", "expected"), [(b"a-Z.9", b"a-Z.9"), (b"no spaces", b"id-0"), (b"x" * 129, b"id-0")]
)
@in_loop
async def test_a_500_carries_the_clients_request_id_if_it_is_sane(sent: bytes, expected: bytes) -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(b"GET / HTTP/1.1\r\nHost: h\r\nX-Request-Id: " + sent + b"\r\n\r\n")
    await app.calls[0].finish(ValueError())
    assert_500(wire, request_id=expected)
    await wire.end()


@in_loop
async def test_a_500_carries_the_id_that_the_application_chose() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    await app.calls[0].start(200, [(b"X-Request-Id", b"chosen")])
    await app.calls[0].finish(ValueError())
    assert_500(wire, request_id=b"chosen")
    await wire.end()


@in_loop
async def test_a_500_carries_the_id_that_the_application_logs() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(b"GET / HTTP/1.1\r\nHost: h\r\nX-Request-Id: mine\r\n\r\n")
    app.calls[0].scope["extensions"][ACCESS_EXTENSION]["request_id"] = "noted"
    await app.calls[0].finish(ValueError())
    assert_500(wire, request_id=b"noted")
    await wire.end()


@in_loop
async def test_a_500_to_head_has_no_body() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
    await app.calls[0].finish(ValueError())
    [response] = wire.responses(heads=[0])
    assert response.status == 500 and wire.output.endswith(b"\r\n\r\n")
    await wire.end()


@in_loop
async def test_returning_without_an_answer_is_a_500() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    await app.calls[0].finish()
    assert_500(wire)
    await wire.end()


@in_loop
async def test_an_exception_after_the_head_shows_as_a_cut() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET + GET)
    await app.calls[0].start()
    await app.calls[0].body(b"part", more=True)
    await app.calls[0].finish(ValueError())
    [response] = wire.responses()
    assert (response.body, response.complete) == (b"part", False)
    assert wire.transport.closed and not wire.transport.aborted
    assert len(app.calls) == 1
    await wire.end()


@in_loop
async def test_where_only_the_end_ends_the_body_a_cut_is_a_reset() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET_1_0)
    await app.calls[0].start()
    await app.calls[0].body(b"part", more=True)
    await app.calls[0].finish(ValueError())
    assert wire.transport.aborted
    await wire.end()


@in_loop
async def test_an_exception_after_the_end_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    await app.calls[0].start()
    await app.calls[0].body(b"ok")
    await app.calls[0].finish(ValueError("late"))
    assert [r.status for r in wire.responses()] == [200]
    assert "late" in caplog.text
    assert not wire.ended
    await wire.end()


@pytest.mark.parametrize("group", [False, True])
@in_loop
async def test_a_disconnect_is_no_error(caplog: pytest.LogCaptureFixture, group: bool) -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    await app.calls[0].start()
    await wire.lose()
    with pytest.raises(OSError) as caught:
        await app.calls[0].body(b"x")
    error: BaseException = caught.value
    assert isinstance(error, ClientDisconnected)
    await app.calls[0].finish(ExceptionGroup("tasks", [caught.value]) if group else error)
    assert not caplog.records
    await wire.end()


@pytest.mark.parametrize(
    "header",
    [
        (b"x", b"a\r\nset-cookie: b"),
        (b"x", b"a\nb"),
        (b"x", b"a\rb"),
        (b"x\r\ny", b"a"),
        (b"x", b"a\0b"),
        (b"content-length", b"two"),
        (b"content-length", b"-2"),
    ],
)
@pytest.mark.parametrize("status", [200, 204])
@in_loop
async def test_bad_response_headers_are_our_bug(header: tuple[bytes, bytes], status: int) -> None:
    app = Recorder(status=status, headers=[header])
    wire = Wire(app)
    await wire.send(GET)
    assert_500(wire)
    await wire.end()


@in_loop
async def test_two_lengths_are_our_bug() -> None:
    wire = Wire(Recorder(headers=[(b"content-length", b"2")] * 2))
    await wire.send(GET)
    assert_500(wire)
    await wire.end()


@pytest.mark.parametrize("status", [100, 101, 199, 1000])
@in_loop
async def test_only_final_statuses(status: int) -> None:
    wire = Wire(Recorder(status=status))
    await wire.send(GET)
    assert_500(wire)
    await wire.end()


@pytest.mark.parametrize("bodies", [[b"abc"], [b"a"], [b"a", b"bc"], [b"a", b""]])
@in_loop
async def test_a_body_of_another_length_than_said(bodies: list[bytes]) -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    with pytest.raises(RuntimeError, match="length"):
        await stream(app, *bodies, headers=[(b"content-length", b"2")])
    await app.calls[0].finish(RuntimeError())
    [response] = wire.responses()
    # Told apart while nothing is on the wire; a cut afterwards.
    assert response.status == 500 if len(bodies) == 1 else not response.complete
    assert wire.transport.closed
    await wire.end()


@in_loop
async def test_messages_out_of_order() -> None:
    app = Puppet()
    wire = Wire(app)
    await wire.send(GET)
    [call] = app.calls
    with pytest.raises(RuntimeError, match="before"):
        await call.body(b"x")
    with pytest.raises(RuntimeError, match="unexpected message"):
        await call._send({"type": "http.response.push"})
    await call.start()
    with pytest.raises(RuntimeError, match="twice"):
        await call.start()
    await call.body(b"x")
    for message in (call.body(b"x"), call.start()):
        with pytest.raises(RuntimeError, match="complete"):
            await message
    await call.finish()
    assert [r.body for r in wire.responses()] == [b"x"]
    await wire.end()


@in_loop
async def test_access_log(caplog: pytest.LogCaptureFixture) -> None:
    app = Puppet()
    wire = Wire(app)
    wire.context.access_log = logging.getLogger("mlxd.access")
    fields = ("client", "method", "path", "status", "bytes", "duration_ms", "request_id")
    with caplog.at_level(logging.INFO, logger="mlxd.access"):
        await wire.send(b"GET /a%20b?secret=1 HTTP/1.1\r\nHost: h\r\n\r\n" * 2)
        wire.now += 0.25
        await app.calls[0].start(201, [(b"x-request-id", b"r1")])
        await app.calls[0].body(b"abc", more=True)
        await app.calls[0].body(b"de")
        await app.calls[0].finish()
        await settle()
        await app.calls[1].start()
        await app.calls[1].body(b"f", more=True)
        await wire.lose()
        await app.calls[1].finish()
        wire = Wire(app, context=wire.context)
        await wire.send(GET)
        await app.calls[2].finish(ValueError())
        wire = Wire(app, context=wire.context)
        await wire.send(b"nonsense")
    logged = [
        tuple(getattr(record, name) for name in fields)
        for record in caplog.records
        if record.name == "mlxd.access"
    ]
    client = "10.0.0.9:4242"
    assert logged == [
        (client, "GET", "/a b", 201, 5, 250.0, "r1"),
        (client, "GET", "/a b", 499, 1, 250.0, None),
        (client, "GET", "/", 500, 0, 0.0, "id-0"),
        (client, "-", "-", 400, 0, 0.0, "id-1"),
    ]
    await wire.end()
