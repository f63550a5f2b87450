"""Bytes in, bytes out: a connection over a fake transport, a fake clock, and a reader of responses.

It does not know real sockets; test_sockets.py has those.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mlxd.api.errors import error_headers, error_response
from mlxd.config import ServerConfig
from mlxd.errors import HTTPStatusError
from mlxd.server.asgi import Application, Message, Receive, Scope, Send
from mlxd.server.context import ServerContext
from mlxd.server.protocol import Connection
from mlxd.server.responses import DateLine, Headers

DATE = b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
SERVER = b"server: mlxd\r\n"

Split = Callable[[bytes], Iterable[bytes]]


def describe_error(
    error: HTTPStatusError, path: str, request_id: str, headers: Headers
) -> tuple[int, dict[str, Any], Headers]:
    """In the words of mlxd's application."""
    return (*error_response(error, path, request_id), error_headers(error))


def whole(data: bytes) -> Iterable[bytes]:
    return [data]


def byte_by_byte(data: bytes) -> Iterable[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in an event loop of its own; nothing it started may be left over."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            await test(*args, **kwargs)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks left: {left}"

        asyncio.run(main())

    return run


class FakeTransport(asyncio.Transport):
    """A peer that takes everything at once, or, `stalled`, only what `take()` lets through."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": ("10.0.0.9", 4242), "sockname": ("10.0.0.1", 8000)})
        self.protocol = protocol
        self.output = bytearray()
        self.writes: list[bytes] = []
        self.stalled = False
        self.unsent = 0
        self.high = 0
        self.max_unsent = 0
        self.write_paused = False
        self.incoming: deque[bytes] = deque()
        self.reading = True
        self.closed = False
        self.eof_written = False
        self.aborted = False
        self.lost = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        self.high = high

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: bytes) -> None:
        assert isinstance(data, bytes)
        assert not self.closed and not self.eof_written, "written after the end"
        self.writes.append(data)
        self.output += data
        if self.stalled:
            self.unsent += len(data)
            self.max_unsent = max(self.max_unsent, self.unsent)
            if self.unsent > self.high and not self.write_paused:
                self.write_paused = True
                self.protocol.pause_writing()

    def take(self, size: int | None = None) -> None:
        """The peer takes `size` unsent bytes (all of them)."""
        self.unsent -= self.unsent if size is None else min(size, self.unsent)
        if self.write_paused and self.unsent <= self.high // 4:
            self.write_paused = False
            self.protocol.resume_writing()
        if self.closed and not self.unsent:
            self._lose()

    def pause_reading(self) -> None:
        assert self.reading and not self.closed
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading and not self.closed
        self.reading = True
        asyncio.get_running_loop().call_soon(self.deliver)

    def deliver(self) -> None:
        while self.incoming and self.reading and not self.closed:
            self.protocol.data_received(self.incoming.popleft())

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof_written = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True
        if not self.unsent:
            self._lose()

    def abort(self) -> None:
        self.aborted = self.closed = True
        self._lose()

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class Wire:
    """One connection to `app`. The clock stands still until `wait()`."""

    def __init__(
        self, app: Application, *, split: Split = whole, context: ServerContext | None = None, **config: Any
    ) -> None:
        self.now = 1000.0
        self.split = split
        ids = (f"id-{n}" for n in itertools.count())
        self.context = context or ServerContext(
            app=app,
            config=ServerConfig(**config),
            loop=asyncio.get_running_loop(),
            clock=lambda: self.now,
            date_line=DateLine(lambda: 0.0),
            describe_error=describe_error,
            request_id_factory=lambda: next(ids),
        )
        self.connection = Connection(self.context)
        self.transport = FakeTransport(self.connection)
        self.connection.connection_made(self.transport)

    async def send(self, data: bytes) -> None:
        """The client writes; the application runs in between and then until nothing moves."""
        for piece in self.split(data):
            self.transport.incoming.append(piece)
            self.transport.deliver()
            await asyncio.sleep(0)
        await settle()

    async def eof(self) -> None:
        if not self.connection.eof_received():
            self.transport.close()
        await settle()

    async def lose(self) -> None:
        """The client is gone."""
        self.transport.abort()
        await settle()

    async def wait(self, seconds: float) -> None:
        self.now += seconds
        self.connection.check_time(self.now)
        await settle()

    @property
    def output(self) -> bytes:
        return bytes(self.transport.output)

    @property
    def ended(self) -> bool:
        """Whether the server has ended its side."""
        return self.transport.closed or self.transport.eof_written

    def responses(self, *, heads: Iterable[int] = ()) -> list[Response]:
        return read_responses(self.output, heads=heads)

    async def end(self) -> None:
        await self.lose()
        assert not self.context.connections
        for exchange in list(self.context.exchanges):
            exchange.task.cancel()
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@dataclass
class Response:
    status: int
    headers: dict[bytes, bytes]
    body: bytes
    complete: bool


def read_responses(data: bytes, *, heads: Iterable[int] = ()) -> list[Response]:
    """All responses in `data`, by RFC 9112. `heads`: the indexes of answers to HEAD."""
    responses: list[Response] = []
    while data:
        head, separator, data = data.partition(b"\r\n\r\n")
        assert separator, f"an unfinished head: {head!r}"
        status_line, *lines = head.split(b"\r\n")
        version, status, _ = status_line.split(b" ", 2)
        assert version == b"HTTP/1.1"
        headers: dict[bytes, bytes] = {}
        for line in lines:
            name, value = line.split(b": ", 1)
            assert name not in headers, f"{name!r} twice"
            headers[name] = value
        response = Response(int(status), headers, b"", True)
        if response.status < 200:
            responses.append(response)
            continue
        is_head = sum(r.status >= 200 for r in responses) in heads
        responses.append(response)
        if is_head or response.status in (204, 304):
            continue
        if headers.get(b"transfer-encoding") == b"chunked":
            assert b"content-length" not in headers
            response.body, response.complete, data = _read_chunks(data)
        elif b"content-length" in headers:
            length = int(headers[b"content-length"])
            response.body, data = data[:length], data[length:]
            response.complete = len(response.body) == length
        else:
            response.body, data = data, b""
    return responses


def _read_chunks(data: bytes) -> tuple[bytes, bool, bytes]:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        if int(size, 16) == 0:
            assert data.startswith(b"\r\n")
            return body, True, data[2:]
        chunk, data = data[: int(size, 16)], data[int(size, 16) :]
        assert data.startswith(b"\r\n")
        body, data = body + chunk, data[2:]
    return body, False, b""


@dataclass
class Recorder:
    """An application that reads the whole request, notes it, and answers with `body`."""

    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b"ok"
    scopes: list[Scope] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.bodies.append(await read_body(receive))
        await respond(send, self.status, self.headers, self.body)


async def read_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message["body"]
        if not message["more_body"]:
            return body


async def respond(
    send: Send, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = (), body: bytes = b""
) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Puppet:
    """An application that the test drives: each call waits in `calls` for orders."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        self.calls.append(call)
        await call.done.wait()
        if call.error is not None:
            raise call.error


class Call:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self.done = asyncio.Event()
        self.error: BaseException | None = None

    async def start(self, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, *, more: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def respond(self, body: bytes = b"") -> None:
        await self.start()
        await self.body(body)
        await self.finish()

    async def finish(self, error: BaseException | None = None) -> None:
        """The application returns, or raises."""
        self.error = error
        self.done.set()
        await settle()

    def receiving(self) -> asyncio.Task[Message]:
        async def receive() -> Message:
            return await self.receive()

        return asyncio.create_task(receive())
