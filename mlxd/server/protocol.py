"""One connection: bytes to exchanges, in order.

It does not know what a response looks like (exchange.py) or what a request may contain (request.py); it knows
whose turn it is, when to read on, and when the connection has to end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import cast

import httptools

from mlxd.errors import BodyTimeoutError, HTTPStatusError, InternalError, OverloadedError
from mlxd.server.context import ServerContext
from mlxd.server.exchange import Exchange
from mlxd.server.flow import FlowControl
from mlxd.server.refusal import Refusal
from mlxd.server.request import Address, RequestHead
from mlxd.server.responses import RefusedRequest

logger = logging.getLogger("mlxd.server")

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
    """An asyncio protocol with httptools' callbacks.

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
        "_head",
        "_input_closed",
        "_is_fresh",
        "_opaque_bytes",
        "_parser",
        "_paused_at",
        "_refusal",
        "_replaying",
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
        self._parser = httptools.HttpRequestParser(self)
        self._head: RequestHead | None = None
        self._refusal: Refusal | None = None
        self._replaying = False
        self._is_fresh = True
        """no request has come yet"""
        self._input_closed = False
        """nothing that arrives is looked at any more"""
        self._closing_since: float | None = None
        self._opaque_bytes = 0
        """bytes fed since the parser last gave something that bounds them: a head, body bytes, a chunk"""
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
            self._refuse(OverloadedError("The server has too many connections.", retry_after=2))
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
        self._parser = self._head = self._refusal = None
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
            end = self._end_of_piece(data, offset)
            self._opaque_bytes += end - offset
            try:
                self._parser.feed_data(data if end - offset == size else memoryview(data)[offset:end])
                self._check_opaque_bytes()
            except httptools.HttpParserUpgrade as upgrade:
                offset += upgrade.args[0]
                self._ignore_upgrade()
            except httptools.HttpParserError as error:
                self._refuse(_reason(error))
            except RefusedRequest as error:
                self._refuse(error)
            else:
                offset = end

    def _is_queue_full(self) -> bool:
        return self.receiving is None and len(self.queue) >= self.context.config.max_pipelined_requests

    def _end_of_piece(self, data: bytes, offset: int) -> int:
        """Up to the end of a sized body, else past the next empty line: every head ends in one."""
        receiving = self.receiving
        if receiving is not None and receiving.content_remaining:
            return min(len(data), offset + receiving.content_remaining)
        end = data.find(b"\r\n\r\n", offset)
        return end + 4 if end >= 0 else len(data)

    def _check_opaque_bytes(self) -> None:
        """The parser holds an unfinished header, and passes over chunk extensions, without a word to us."""
        config = self.context.config
        if self._opaque_bytes > config.max_request_line_bytes + config.max_header_bytes + len(b"\r\n\r\n"):
            raise RefusedRequest(431, "The request line and headers are too long.", code="headers_too_large")

    def _ignore_upgrade(self) -> None:
        """Go on as if the request had asked for no upgrade (RFC 9110 section 7.8 lets us).

        Java's HttpClient asks for h2c with every first request. The parser, having seen Upgrade, takes the
        body for another protocol's bytes; a fresh one gets a head with the same framing instead.
        """
        self._parser = httptools.HttpRequestParser(self)
        if self.receiving is not None:
            assert self._head is not None
            self._replaying = True
            self._parser.feed_data(self._head.without_upgrade())

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

    # Parser callbacks.

    def on_message_begin(self) -> None:
        if self._replaying:
            return
        self._head = RequestHead(self.context.config)
        self._is_fresh = False
        if self.active is None:
            self._waiting_since = self.context.clock()

    def on_url(self, fragment: bytes) -> None:
        if not self._replaying:
            assert self._head is not None
            self._head.add_target(self._parser.get_method(), fragment)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._replaying:
            assert self._head is not None
            self._head.add_header(name, value)

    def on_headers_complete(self) -> None:
        if self._replaying:
            self._replaying = False
            return
        head = self._head
        assert head is not None
        self._opaque_bytes = 0
        head.finish(self._parser.get_http_version())
        self._discarded_bytes = 0
        exchange = Exchange(
            self,
            head.scope(client=self._client, server=self._server, state=self.context.state.copy()),
            keep_alive=self._parser.should_keep_alive(),
            content_length=None if head.chunked else head.content_length,
            wants_continue=head.wants_continue,
        )
        self.receiving = exchange
        if self.active is None:
            self._activate(exchange)
        else:
            self.queue.append(exchange)

    def on_chunk_header(self) -> None:
        self._opaque_bytes = 0

    def on_body(self, data: bytes) -> None:
        self._opaque_bytes = 0
        exchange = self.receiving
        if exchange is None:  # closed by a callback before this one
            return
        exchange.feed_body(data)
        if exchange.response_complete:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > DISCARD_BYTES:
                self.close()

    def on_message_complete(self) -> None:
        exchange, head = self.receiving, self._head
        if exchange is None or head is None:  # closed by a callback before this one
            return
        self._opaque_bytes = 0
        if self._parser.should_upgrade() and head.has_body:
            return  # the body is still to come: _ignore_upgrade
        self.receiving = self._head = None
        exchange.finish_body()
        if self.active is None:
            self._waiting_since = self.context.clock()
        if not exchange.keep_alive:
            self._input_closed = True  # what follows is not a request (RFC 9112 section 9.6)

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

    def _refuse(self, error: HTTPStatusError) -> None:
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
        self._refusal = Refusal(error.with_traceback(None), self._client, self._head)
        if self.active is None:
            self._answer_refusal(self._refusal)

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
            if self._head is not None:
                if waited >= config.header_timeout_seconds:
                    self._refuse(BodyTimeoutError("The request's headers took too long."))
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
            self._refuse(BodyTimeoutError("The request's body took too long."))
        else:
            self.close()  # answered long ago


def _address(value: object) -> Address | None:
    """A socket's name as ASGI wants it: (host, port), (path, None), or None where it has none."""
    if isinstance(value, tuple):
        return str(value[0]), int(value[1])
    return (value, None) if isinstance(value, str) and value else None


def _reason(error: Exception) -> HTTPStatusError:
    """Why the parser stopped: its own complaint, our refusal from a callback, or a bug in one."""
    cause = error.__context__
    if cause is None:
        return RefusedRequest(400, f"Malformed request: {error}.")
    if isinstance(cause, HTTPStatusError):
        return cause
    logger.error("exception in a parser callback", exc_info=cause)
    return InternalError("Internal server error.")
