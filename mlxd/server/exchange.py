"""One request and its response: the `receive` and `send` that the application gets.

It does not parse bytes and does not know what follows on the same connection; its connection tells it of body
bytes and of the client's leaving, and is told when the response is complete.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlxd.asgi_extensions import ACCESS_EXTENSION, WRITE_EXTENSION
from mlxd.errors import HTTPStatusError, InternalError, NotReadyError
from mlxd.request_ids import sane_request_id
from mlxd.server.asgi import ClientDisconnected, Message, Scope
from mlxd.server.responses import CONTINUE, SERVER_LINE, error_response, status_line

if TYPE_CHECKING:
    from mlxd.server.protocol import Connection

logger = logging.getLogger("mlxd.server")

CLIENT_CLOSED_REQUEST = 499
LARGE_PIECE_BYTES = 1 << 16
"""Not copied to stand behind the head: ten megabytes take some milliseconds of fresh memory."""


class Framing(enum.Enum):
    """How the client knows where the response body ends (RFC 9112 section 6.3)."""

    NONE = enum.auto()
    """no body bytes: HEAD, 204, 304"""
    SIZED = enum.auto()
    CHUNKED = enum.auto()
    UNTIL_CLOSE = enum.auto()
    """HTTP/1.0 without a length"""


_NONE, _CHUNKED = Framing.NONE, Framing.CHUNKED
"""Every piece of a body asks for these; before 3.12, a member of an enum takes 0.1 us to get at."""


class Exchange:
    """The request/response cycle.

    `response_started`: the application has sent its start message. `head_sent`: its head is on the wire,
    together with the first body bytes, as ASGI asks. `streaming`: head sent, response not complete, client
    there; the one flag that the hot path looks at.
    """

    __slots__ = (
        "__weakref__",
        "_body",
        "_body_delivered",
        "_event",
        "_framing",
        "_headers",
        "_logged",
        "_remaining_bytes",
        "_start_time",
        "body_bytes_buffered",
        "body_bytes_received",
        "body_complete",
        "body_since",
        "connection",
        "context",
        "disconnected",
        "flow",
        "head_sent",
        "http_1_0",
        "is_head",
        "keep_alive",
        "request_id",
        "response_bytes",
        "response_complete",
        "response_started",
        "scope",
        "status",
        "streaming",
        "task",
        "wants_continue",
    )

    def __init__(
        self,
        connection: Connection,
        scope: Scope,
        *,
        keep_alive: bool,
        wants_continue: bool,
    ) -> None:
        self.connection = connection
        self.context = connection.context
        self.flow = connection.flow
        self.scope = scope
        self.task: asyncio.Task[None]
        """the application's call, from start() on"""
        self.http_1_0: bool = scope["http_version"] == "1.0"
        self.is_head: bool = scope["method"] == "HEAD"
        self.keep_alive = keep_alive
        # The request's body.
        self.wants_continue = wants_continue
        """the client holds its body back until it sees 100 (Continue)"""
        self.body_complete = False
        self.body_bytes_buffered = 0
        self.body_bytes_received = 0
        self.body_since = self.context.clock()
        """when waiting for the body began, moved on by the time that reading was paused"""
        self._body: list[bytes] = []
        self._body_delivered = False
        self._event = asyncio.Event()
        # The response.
        self.response_started = False
        self.head_sent = False
        self.streaming = False
        self.response_complete = False
        self.disconnected = False
        self.status = 0
        self.response_bytes = 0
        """body bytes, before chunk framing"""
        self.request_id: str | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._framing = Framing.NONE
        self._remaining_bytes = 0
        """of a sized response"""
        self._start_time = self.context.clock()
        self._logged = False

    # What the connection calls.

    def start(self) -> None:
        """Call the application. The connection has made this exchange its active one."""
        self.context.exchanges.add(self)
        self.body_since = self.context.clock()
        self.task = self.context.loop.create_task(self._run())

    def feed_body(self, data: bytes) -> None:
        self.wants_continue = False
        self.body_bytes_received += len(data)
        if self.response_complete or self.disconnected:
            return
        self._body.append(data)
        self.body_bytes_buffered += len(data)
        self._event.set()

    def finish_body(self) -> None:
        self.body_complete = True
        self._event.set()

    def disconnect(self) -> None:
        """The client has gone, or is about to be sent away: nothing more can be sent."""
        self.disconnected = True
        self.streaming = False
        self._event.set()

    def refuse(self, error: HTTPStatusError) -> None:
        """Answer with `error` in the application's place, if it is not too late, and end the connection."""
        if self.response_complete or self.disconnected:
            return
        request_id = self._resolve_request_id()
        self.status, description, headers = self.context.describe_error(
            error, self.scope["path"], request_id, self.scope["headers"]
        )
        # By which the application, to which the client seems to have left, can tell.
        self.scope["extensions"][ACCESS_EXTENSION].update(status=self.status, error=error.code or error.type)
        if not self.head_sent:
            self.flow.write(
                error_response(
                    self.status,
                    description,
                    headers,
                    request_id=request_id,
                    date_line=self.context.date_line(),
                    without_body=self.is_head,
                )
            )
            self.disconnect()
            self.connection.close()
        else:
            # The missing end of a chunked or sized body shows the client that it is cut short; where only
            # the end of the connection ends the body, it has to be an abnormal one.
            self.disconnect()
            self.connection.close(abort=self._framing is Framing.UNTIL_CLOSE)

    # What the application calls.

    async def receive(self) -> Message:
        while True:
            if self.disconnected or self.response_complete:
                return {"type": "http.disconnect"}
            if self._body or (self.body_complete and not self._body_delivered):
                return self._take_body()
            if self.wants_continue and not self.head_sent:
                # RFC 9110 section 10.1.1: only once the body is really wanted.
                self.wants_continue = False
                self.body_since = self.context.clock()
                self.flow.write(CONTINUE)
            self._event.clear()
            await self._event.wait()

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.body":
            body: bytes = message.get("body", b"")
            last = not message.get("more_body", False)
            if self.streaming:
                data = self._frame(body, last)
            elif self.response_started and not (self.response_complete or self.disconnected):
                head, data = self._compose_head(body, last), self._frame(body, last)
                self.head_sent = self.streaming = True
                if len(data) < LARGE_PIECE_BYTES:
                    data = head + data
                else:
                    self.flow.write(head)
            else:
                self._check_can_send(kind)
                raise RuntimeError("http.response.body was sent before http.response.start")
            if data:
                self.flow.write(data)
            if last:
                self._complete()
            elif self.flow.write_paused:
                await self.flow.drain()
        elif kind == "http.response.start":
            self._check_can_send(kind)
            if self.response_started:
                raise RuntimeError("http.response.start was sent twice")
            self._start(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"unexpected message {kind!r}")

    def write(self, body: bytes) -> bool:
        """WRITE_EXTENSION's. False before the first piece, while the client is slow, and once nothing can be
        sent, where `send` raises."""
        if not self.streaming or self.flow.write_paused:
            return False
        data = self._frame(body, False)
        if data:
            self.flow.write(data)
        return True

    # The request's side.

    def _take_body(self) -> Message:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self.body_bytes_buffered = 0
        self._body_delivered = self.body_complete
        if self.flow.read_paused:
            self.connection.update_reading()
        return {"type": "http.request", "body": body, "more_body": not self.body_complete}

    # The response's side.

    def _check_can_send(self, kind: str) -> None:
        if self.disconnected:
            raise ClientDisconnected("the client has disconnected")
        if self.response_complete:
            raise RuntimeError(f"{kind} was sent after the response was complete")

    def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        if not 200 <= status <= 999:
            raise RuntimeError(f"{status} is not the status of a final response")
        self._headers = [(bytes(name).lower(), bytes(value)) for name, value in headers]
        self.status = status
        self.response_started = True

    def _compose_head(self, body: bytes, last: bool) -> bytes:
        """Status line and headers; decides the framing, for which it wants the first body message."""
        lines = [status_line(self.status)]
        content_length: int | None = None
        own_date = own_server = False
        for name, value in self._headers:
            if name == b"content-length":
                if content_length is not None or not value.isdigit():
                    raise RuntimeError(f"bad content-length {value!r}")
                content_length = int(value)
                continue
            if name == b"transfer-encoding":
                continue  # framing is the server's
            if name == b"connection":
                if value.lower() == b"close":
                    self.keep_alive = False
                continue
            if name == b"date":
                own_date = True
            elif name == b"server":
                own_server = True
            elif name == b"x-request-id":
                self.request_id = value.decode("latin-1")
            lines.append(b"%b: %b\r\n" % (name, value))
        if not own_date:
            lines.append(self.context.date_line())
        if not own_server:
            lines.append(SERVER_LINE)
        if framing := self._framing_lines(content_length, len(body) if last else None):
            lines.append(framing)
        if self.context.shutting_down or self.wants_continue:
            # A client still waiting for 100 may or may not send its body now: what follows is unknowable.
            self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        elif self.http_1_0:
            lines.append(b"connection: keep-alive\r\n")
        head = b"".join(lines)
        ends = head.count(b"\r\n")
        if ends != len(lines) or head.count(b"\n") != ends or head.count(b"\r") != ends or b"\0" in head:
            raise RuntimeError("a response header holds CR, LF or NUL")
        return head + b"\r\n"

    def _framing_lines(self, content_length: int | None, whole_bytes: int | None) -> bytes:
        """The length or coding header. `whole_bytes` is the body's length where all of it is at hand."""
        if self.status in (204, 304):
            self._framing = Framing.NONE
            # RFC 9110 section 8.6: never with 204; with 304 it tells of the representation.
            if self.status == 204 or content_length is None:
                return b""
            return b"content-length: %d\r\n" % content_length
        if content_length is None:
            content_length = whole_bytes
        if content_length is not None:
            self._framing = Framing.NONE if self.is_head else Framing.SIZED
            self._remaining_bytes = content_length
            return b"content-length: %d\r\n" % content_length
        if self.http_1_0:
            self.keep_alive = False
            self._framing = Framing.NONE if self.is_head else Framing.UNTIL_CLOSE
            return b""
        self._framing = Framing.NONE if self.is_head else Framing.CHUNKED
        return b"transfer-encoding: chunked\r\n"

    def _frame(self, body: bytes, last: bool) -> bytes:
        """What goes on the wire for a body message."""
        framing = self._framing
        if framing is _NONE:
            return b""
        self.response_bytes += len(body)
        if framing is _CHUNKED:
            if not last:
                # An empty chunk would end the body.
                return b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        if framing is Framing.SIZED:
            self._remaining_bytes -= len(body)
            if self._remaining_bytes < 0 or (last and self._remaining_bytes):
                raise RuntimeError("the response body does not have the length that content-length says")
        return body

    def _complete(self) -> None:
        self.response_complete = True
        self.streaming = False
        self._body.clear()
        self.body_bytes_buffered = 0
        self._event.set()
        self._log()
        self.connection.response_finished(self)

    # The application's call.

    async def _run(self) -> None:
        extensions = self.scope["extensions"]
        extensions[WRITE_EXTENSION] = self.write
        try:
            await self.context.app(self.scope, self.receive, self.send)
            if not (self.response_complete or self.disconnected):
                raise RuntimeError("the application returned before its response was complete")
        except asyncio.CancelledError:
            self.refuse(NotReadyError("The server is shutting down."))
            raise
        except Exception as error:
            if not _is_disconnect(error):
                request_id = self._resolve_request_id()
                logger.error("exception in the application, request %s", request_id, exc_info=error)
                self.refuse(InternalError("Internal server error."))
        finally:
            del extensions[WRITE_EXTENSION]  # the exchange would hold itself alive
            self._log()
            self.context.exchange_ended(self)

    def _resolve_request_id(self) -> str:
        """The id that the response carries or will carry; the application may have chosen it already."""
        if self.request_id is None:
            self.request_id = (
                sane_request_id(self._headers)
                or self.scope["extensions"][ACCESS_EXTENSION].get("request_id")
                or sane_request_id(self.scope["headers"])
                or self.context.request_id_factory()
            )
        return self.request_id

    def _log(self) -> None:
        """One access line, when the response is complete or, failing that, when the application ends."""
        access_log = self.context.access_log
        if self._logged or access_log is None:
            return
        self._logged = True
        client = self.scope["client"]
        fields: dict[str, Any] = {
            "client": f"{client[0]}:{client[1]}" if client else "-",
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self.status if self.response_complete or self.status >= 400 else CLIENT_CLOSED_REQUEST,
            "bytes": self.response_bytes,
            "duration_ms": round((self.context.clock() - self._start_time) * 1000, 3),
            "request_id": self.request_id,
            **self.scope["extensions"][ACCESS_EXTENSION],
        }
        log_access(access_log, fields)


def log_access(access_log: logging.Logger, fields: dict[str, Any]) -> None:
    """The fields of an access line: client, method, path, status, bytes, duration_ms, request_id."""
    access_log.info("%(client)s %(method)s %(path)s %(status)d", fields, extra=fields)


def _is_disconnect(error: BaseException) -> bool:
    """Whether this is only the news that the client left, perhaps wrapped by a TaskGroup."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(ClientDisconnected)[1] is None
    return isinstance(error, ClientDisconnected)
