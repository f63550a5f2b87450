"""One connection: bytes to exchanges, in order.

It does not know what a response looks like (exchange.py) or how requests are read (parser.py, request.py); it
knows whose turn it is, when to read on, and when the connection has to end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

from mlxd.errors import BodyTimeoutError, HTTPStatusError, OverloadedError
from mlxd.server.context import ServerContext
from mlxd.server.exchange import Exchange
from mlxd.server.flow import FlowControl
from mlxd.server.parser import RequestParser
from mlxd.server.refusal import Refusal
from mlxd.server.request import Address, RequestHead

BODY_BUFFER_BYTES = 65536
"""Body bytes the application has not taken, above which the connection is not read."""
DISCARD_BYTES = 1 << 20
"""Body bytes read and dropped after an early answer to keep the connection; beyond, it is closed."""
LINGER_SECONDS = 2.0
"""How long the client's bytes are still read after our last one. Closing with unread bytes makes the kernel
send a reset, which can take the answer from the client before it is read (RFC 9112 section 9.6)."""
MIN_BODY_BYTES_PER_SECOND = 16384
"""Beyond its first body_timeout_seconds, a body may go on only as long as it comes this fast on average."""
MAX_REFUSED_CONNECTIONS = 256
"""Connections over the limit that get a 503; those beyond are dropped."""


class Connection(asyncio.Protocol):
    """An asyncio protocol, and the listener of its parser.

    `receiving` is the exchange whose body is being read, `active` the one whose response is being written;
    the same one, unless requests are pipelined. `queue` holds complete heads behind the active exchange.
    `_refusal` is what ends the connection when its turn comes. `unparsed` holds bytes read but not
    looked at, because the queue is full.
    """

    __slots__ = (
        "__weakref__",
        "_client",
        "_closing_since",
        "_discarded_bytes",
        "_input_closed",
        "_is_fresh",
        "_parser",
        "_paused_at",
        "_refusal",
        "_server",
        "_waiting_since",
        "active",
        "context",
        "flow",
        "queue",
        "receiving",
        "transport",
        "unparsed",
    )

    flow: FlowControl
    transport: asyncio.Transport | None

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self.transport = None
        self.active: Exchange | None = None
        self.receiving: Exchange | None = None
        self.queue: deque[Exchange] = deque()
        self.unparsed = b""
        self._client: Address | None = None
        self._server: Address | None = None
        self._parser = RequestParser(self, context.config)
        self._refusal: Refusal | None = None
        self._is_fresh = True
        """no request has come yet"""
        self._input_closed = False
        """nothing that arrives is looked at any more"""
        self._closing_since: float | None = None
        self._discarded_bytes = 0
        self._waiting_since = 0.0
        """since when no exchange is active"""
        self._paused_at = 0.0

    # Transport callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        context = self.context
        self.transport = transport = cast(asyncio.Transport, transport)
        self._waiting_since = context.clock()
        self.flow = FlowControl(
            transport, write_buffer_bytes=context.config.write_buffer_bytes, now=self._waiting_since
        )
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        context.connections.add(self)
        excess = len(context.connections) - context.config.max_connections
        if excess > MAX_REFUSED_CONNECTIONS:
            transport.abort()
        elif excess > 0:
            self.request_refused(OverloadedError("The server has too many connections.", retry_after=2))
        elif context.shutting_down:
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self._input_closed:
            return
        if self.unparsed:
            data, self.unparsed = self.unparsed + data, b""
        self._parse(data)
        self.update_reading()

    def eof_received(self) -> bool:
        """The client has shut down its side.

        Most often it has gone, which only a write would show otherwise; so a half-closed connection is
        treated as gone, and a generation nobody waits for stops at once.
        """
        if self.active is not None:
            self.active.disconnect()
        self.receiving = None  # nothing more will come, so there is nothing to linger for
        self.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self.active is not None:
            self.active.disconnect()
        self.flow.resume_writing()
        self._input_closed = True
        self._parser.close()
        self._refusal = None
        self.active = self.receiving = self.transport = None
        self.queue.clear()
        self.unparsed = b""
        self.context.connection_ended(self)

    def pause_writing(self) -> None:
        self.flow.pause_writing()

    def resume_writing(self) -> None:
        self.flow.resume_writing()

    # Reading.

    def _parse(self, data: bytes) -> None:
        """Feed the parser, in pieces that hold one head each, so that a full queue stops it in between."""
        offset, size = 0, len(data)
        while offset < size and not self._input_closed:
            if self._is_queue_full():
                self.unparsed = data[offset:]
                return
            offset = self._parser.feed(data, offset)

    def _is_queue_full(self) -> bool:
        return self.receiving is None and len(self.queue) >= self.context.config.max_pipelined_requests

    def update_reading(self) -> None:
        """Read on, or stop, by what is waiting inside."""
        if self.transport is None or self._closing_since is not None:
            return
        receiving = self.receiving
        if (
            self.unparsed
            or self._is_queue_full()
            or (receiving is not None and receiving.body_bytes_buffered > BODY_BUFFER_BYTES)
        ):
            if not self.flow.read_paused:
                self._paused_at = self.context.clock()
                self.flow.pause_reading()
        elif self.flow.read_paused:
            if receiving is not None:
                receiving.body_since += self.context.clock() - self._paused_at
            self.flow.resume_reading()

    # What the parser calls.

    def request_began(self) -> None:
        self._is_fresh = False
        if self.active is None:
            self._waiting_since = self.context.clock()

    def head_received(self, head: RequestHead, *, keep_alive: bool) -> None:
        self._discarded_bytes = 0
        exchange = Exchange(
            self,
            head.scope(client=self._client, server=self._server, state=self.context.state.copy()),
            keep_alive=keep_alive,
            wants_continue=head.wants_continue,
        )
        self.receiving = exchange
        if self.active is None:
            self._activate(exchange)
        else:
            self.queue.append(exchange)

    def body_received(self, data: bytes) -> None:
        exchange = self.receiving
        if exchange is None:  # closed by a callback before this one
            return
        exchange.feed_body(data)
        if exchange.response_complete:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > DISCARD_BYTES:
                self.close()

    def request_complete(self) -> None:
        exchange = self.receiving
        if exchange is None:  # closed by a callback before this one
            return
        self.receiving = None
        exchange.finish_body()
        if self.active is None:
            self._waiting_since = self.context.clock()
        if not exchange.keep_alive:
            self._input_closed = True  # what follows is not a request (RFC 9112 section 9.6)

    def request_refused(self, error: HTTPStatusError) -> None:
        """Nothing more is read. What was asked before is answered, then `error`, then the end."""
        if self._closing_since is not None:
            return
        self._input_closed = True
        exchange = self.receiving
        if exchange is not None and exchange is self.active:
            exchange.refuse(error)
            return
        if exchange is not None and self.queue and self.queue[-1] is exchange:
            self.queue.pop()
        # Its traceback refers to this connection, which would refer to it.
        self._refusal = Refusal(error.with_traceback(None), self._client, self._parser.head)
        if self.active is None:
            self._answer_refusal(self._refusal)

    # Turns.

    def _activate(self, exchange: Exchange) -> None:
        self.active = exchange
        exchange.start()

    def response_finished(self, exchange: Exchange) -> None:
        """The active exchange's last byte is written: on to the next, or the end."""
        self.active = None
        self._waiting_since = self.context.clock()
        if not exchange.keep_alive or self.context.shutting_down:
            self.close()
        elif self.queue:
            self._activate(self.queue.popleft())
        elif self._refusal is not None:
            self._answer_refusal(self._refusal)
        if self.unparsed:
            data, self.unparsed = self.unparsed, b""
            self._parse(data)
        self.update_reading()

    def _answer_refusal(self, refusal: Refusal) -> None:
        self.flow.write(refusal.answer(self.context))
        self.close(linger=True)

    # The end.

    def shutdown(self) -> None:
        """The server is going: a connection without an exchange closes now, others when theirs is done."""
        if self.active is None:
            self.close()

    def close(self, *, abort: bool = False, linger: bool = False) -> None:
        """Write what is unsent, then close; linger where the client may still be sending."""
        transport = self.transport
        if transport is None or self._closing_since is not None:
            return
        linger = linger or self.receiving is not None
        self._closing_since = self.context.clock()
        self._input_closed = True
        self.receiving = None
        self.queue.clear()
        self.unparsed = b""
        if abort:
            transport.abort()
        elif linger and transport.can_write_eof():
            self.flow.resume_reading()
            transport.write_eof()
        else:
            transport.close()

    def abort(self) -> None:
        if self.active is not None:
            self.active.disconnect()
        self.flow.transport.abort()

    def check_time(self, now: float) -> None:
        """Enforce the time limits; the server calls this at regular intervals (`now` by the context's clock).

        One sweep over all connections in place of a timer for each: a limit costs nothing until it is due.
        """
        if self.transport is None:
            return
        config = self.context.config
        if self.flow.is_stalled(now, config.write_timeout_seconds):
            self.abort()
        elif self._closing_since is not None:
            if self.transport.get_write_buffer_size():
                self._closing_since = now
            elif now - self._closing_since >= LINGER_SECONDS:
                self.transport.abort()
        elif self.receiving is not None:
            self._check_body_time(self.receiving, now)
        elif self.active is None:
            waited = now - self._waiting_since
            if self._parser.head is not None:
                if waited >= config.header_timeout_seconds:
                    self.request_refused(BodyTimeoutError("The request's headers took too long."))
            elif waited >= (config.header_timeout_seconds if self._is_fresh else config.keep_alive_seconds):
                self.close()

    def _check_body_time(self, exchange: Exchange, now: float) -> None:
        """Only while it is the client's turn: asked to send, and being read."""
        if exchange.wants_continue or self.flow.read_paused or exchange in self.queue:
            return
        allowed = self.context.config.body_timeout_seconds
        allowed += exchange.body_bytes_received / MIN_BODY_BYTES_PER_SECOND
        if now - exchange.body_since < allowed:
            return
        if exchange is self.active:
            self.request_refused(BodyTimeoutError("The request's body took too long."))
        else:
            self.close()  # answered long ago


def _address(value: object) -> Address | None:
    """A socket's name as ASGI wants it: (host, port), (path, None), or None where it has none."""
    if isinstance(value, tuple):
        return str(value[0]), int(value[1])
    return (value, None) if isinstance(value, str) and value else None
