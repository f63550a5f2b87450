"""An HTTP/1.1 client connection that times what arrives, and a pool of them.

It does not know what a body means: an `Exchange` gets status and body bytes, each with the time at which
the socket's read returned (one clock call a read, whatever the number of frames in it).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

Clock = Callable[[], float]


class Exchange(Protocol):
    """One request on its way. The connection calls these, in this order, then sets `done`."""

    done: asyncio.Future[None]

    def on_head(self, status: int, now: float) -> None: ...

    def on_body(self, data: bytes, now: float) -> None: ...

    def on_end(self, error: str | None, now: float) -> None:
        """The response is complete (None), or ended early: `truncated`, `disconnected`, `protocol`."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: TCP, TLS or a Unix socket, and the prefix of its paths."""

    host: str
    port: int
    tls: bool = False
    unix_socket: str | None = None
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read `http[s]://host[:port][/prefix]` or `unix:/path`. A trailing /v1 is dropped."""
        if url.startswith("unix:"):
            return cls("localhost", 0, unix_socket=url.removeprefix("unix:"))
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL: expected http://host:port, https://… or unix:/path")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls=tls, prefix=prefix)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else host


def encode_request(
    address: Address, method: str, path: str, body: bytes, *, headers: dict[str, str], keep_alive: bool
) -> bytes:
    """One request as bytes, head and body together, so that it leaves in one write."""
    lines = [f"{method} {address.prefix}{path} HTTP/1.1", f"host: {address.host_header}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    if not keep_alive:
        lines.append("connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class Connection(asyncio.Protocol):
    """One socket, one exchange at a time.

    `reusable` says whether it may carry another exchange; `fresh` whether it has carried none yet.
    """

    __slots__ = (
        "_clock",
        "_exchange",
        "_has_length",
        "_now",
        "_parser",
        "_status",
        "_transport",
        "fresh",
        "received",
        "reusable",
    )

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._now = 0.0
        self._status = 0
        self._has_length = False
        self.fresh = True
        self.received = False
        self.reusable = False

    def start(self, request: bytes, exchange: Exchange) -> None:
        """Send `request`; its response goes to `exchange`."""
        assert self._exchange is None and self._transport is not None
        self._exchange = exchange
        self._status = 0
        self.received = False
        self._transport.write(request)

    def cut(self) -> None:
        """Drop the socket now, as a client does that has gone away. The exchange is not told."""
        self._exchange = None
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.reusable = True

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
        self.received = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end("protocol")
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._transport = None
        if self._exchange is not None:
            self._now = self._clock()
            if not self._status:
                self._end("disconnected")
            else:
                # Without a length the body runs to the end of the connection (RFC 9112, 6.3).
                self._end("truncated" if self._has_length or exc is not None else None)

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._has_length = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and self._exchange is not None:
            self._status = status
            self._exchange.on_head(status, self._now)

    def on_body(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.on_body(data, self._now)

    def on_message_complete(self) -> None:
        if self._status:
            self.reusable = self.reusable and self._parser.should_keep_alive()
            self._end(None)

    def _end(self, error: str | None) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.on_end(error, self._now)
            if not exchange.done.done():
                exchange.done.set_result(None)


class ConnectionPool:
    """Connections to one address: the one used last is used first; none is kept without `keep_alive`."""

    def __init__(self, address: Address, *, keep_alive: bool, clock: Clock) -> None:
        self.address = address
        self.keep_alive = keep_alive
        self.num_opened = 0
        self._clock = clock
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if address.tls else None

    async def acquire(self) -> Connection:
        """An open connection. Raises OSError where none can be had."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return await self._open()

    def release(self, connection: Connection) -> None:
        """Give back a connection whose exchange has ended."""
        connection.fresh = False
        if self.keep_alive and connection.reusable:
            self._idle.append(connection)
        else:
            connection.cut()

    def close(self) -> None:
        """Drop the idle connections."""
        while self._idle:
            self._idle.pop().cut()

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        self.num_opened += 1

        def factory() -> Connection:
            return Connection(self._clock)

        if self.address.unix_socket is not None:
            _, connection = await loop.create_unix_connection(factory, self.address.unix_socket)
        else:
            _, connection = await loop.create_connection(
                factory, self.address.host, self.address.port, ssl=self._tls
            )
        return connection
