"""The date line, and errors as bytes."""

from __future__ import annotations

from mlxd.server.responses import DateLine, RefusedRequest, error_response


def test_the_date_is_made_once_a_second() -> None:
    now = 784111777.2
    line = DateLine(lambda: now)
    first = line()
    assert first == b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
    now += 0.7
    assert line() is first
    now += 0.2
    assert line() == b"date: Sun, 06 Nov 1994 08:49:38 GMT\r\n"


def test_an_error_response() -> None:
    parts = (503, {"why": "full"}, [(b"retry-after", b"7")])
    data = error_response(*parts, request_id="r", date_line=b"date: now\r\n")
    head, body = data.split(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 503 Service Unavailable",
        b"date: now",
        b"server: mlxd",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"connection: close",
        b"x-request-id: r",
        b"retry-after: 7",
    ]
    assert body == b'{"why":"full"}'
    assert error_response(*parts, request_id="r", date_line=b"date: now\r\n", without_body=True) == (
        head + b"\r\n\r\n"
    )


def test_a_refusal_belongs_to_its_instance() -> None:
    error = RefusedRequest(414, "long", code="uri_too_long")
    assert (error.status, error.code, RefusedRequest.status) == (414, "uri_too_long", 400)
