"""The bytes that the server itself composes: status lines, the date, and the errors it answers alone.

It does not know connections: callers say what to write and then write it.
"""

from __future__ import annotations

import email.utils
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import orjson

from mlxd.errors import HTTPStatusError, RequestError

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
SERVER_LINE = b"server: mlxd\r\n"
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in HTTPStatus
}

Headers = list[tuple[bytes, bytes]]
DescribeError = Callable[[HTTPStatusError, str, str, Headers], tuple[int, Mapping[str, Any], Headers]]
"""(error, path, request id, request's headers) -> status, JSON body and headers beside x-request-id, as the
API that the path is of has them. The path is empty, and headers are missing, where they are not known."""


class RefusedRequest(RequestError):
    """What the wire brought is not a request that this server takes. `status` is the HTTP status."""

    def __init__(self, status: int, message: str, *, code: str = "bad_request") -> None:
        super().__init__(message, code=code)
        self.status = status


class DateLine:
    """The `date` header line, made anew once a second. `clock` gives seconds since the epoch."""

    __slots__ = ("_clock", "_line", "_second")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._second = -1
        self._line = b""

    def __call__(self) -> bytes:
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._line = f"date: {email.utils.formatdate(second, usegmt=True)}\r\n".encode("ascii")
        return self._line


def status_line(status: int) -> bytes:
    return STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode("ascii")


def error_response(
    status: int,
    description: Mapping[str, Any],
    headers: Headers,
    *,
    request_id: str,
    date_line: bytes,
    without_body: bool = False,
) -> bytes:
    """A whole response that announces the end of the connection; `description` is its JSON."""
    body = orjson.dumps(description)
    lines = [
        status_line(status),
        date_line,
        SERVER_LINE,
        b"content-type: application/json\r\n",
        b"content-length: %d\r\n" % len(body),
        b"connection: close\r\n",
        b"x-request-id: %b\r\n" % request_id.encode("ascii"),
        *(b"%b: %b\r\n" % header for header in headers),
        b"\r\n",
    ]
    if not without_body:
        lines.append(body)
    return b"".join(lines)
