"""A connection's bytes into heads, body bytes and ends of requests.

It does not know transports, exchanges or turns: it takes bytes and calls its listener. httptools does the
grammar; added are bounds on what it keeps to itself, and that requests to change the protocol are ignored.
"""

from __future__ import annotations

import logging
from typing import Protocol

import httptools

from mlxd.config import ServerConfig
from mlxd.errors import HTTPStatusError, InternalError
from mlxd.server.request import RequestHead
from mlxd.server.responses import RefusedRequest

logger = logging.getLogger("mlxd.server")


class RequestListener(Protocol):
    """What a parser tells, in this order for each request; `body_received` any number of times.

    `request_refused` comes at most once, in place of all that would have followed.
    """

    def request_began(self) -> None: ...

    def head_received(self, head: RequestHead, *, keep_alive: bool) -> None: ...

    def body_received(self, data: bytes) -> None: ...

    def request_complete(self) -> None: ...

    def request_refused(self, error: HTTPStatusError) -> None: ...


class RequestParser:
    """One for a connection. `head` is that of the request which has begun and is not complete."""

    __slots__ = (
        "_body_remaining",
        "_config",
        "_listener",
        "_opaque_bytes",
        "_parser",
        "_replaying",
        "head",
    )

    def __init__(self, listener: RequestListener, config: ServerConfig) -> None:
        self._listener = listener
        self._config = config
        self._parser = httptools.HttpRequestParser(self)
        self._replaying = False
        self._opaque_bytes = 0
        """bytes fed since httptools last gave something that bounds them: a head, body bytes, a chunk"""
        self._body_remaining = 0
        """bytes of a sized body still to come"""
        self.head: RequestHead | None = None

    def feed(self, data: bytes, offset: int) -> int:
        """Take a piece of `data` from `offset` on, which holds one head at most; returns where it ends."""
        end = self._end_of_piece(data, offset)
        self._opaque_bytes += end - offset
        try:
            self._parser.feed_data(data if end - offset == len(data) else memoryview(data)[offset:end])
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade()
            return offset + int(upgrade.args[0])
        except httptools.HttpParserError as error:
            self._listener.request_refused(_reason(error))
        else:
            self._check_opaque_bytes()
        return end

    def close(self) -> None:
        """Break the circle of references; nothing can be fed any more."""
        del self._parser, self._listener

    def _end_of_piece(self, data: bytes, offset: int) -> int:
        """Up to the end of a sized body, else past the next empty line: every head ends in one."""
        if self._body_remaining:
            return min(len(data), offset + self._body_remaining)
        end = data.find(b"\r\n\r\n", offset)
        return end + 4 if end >= 0 else len(data)

    def _check_opaque_bytes(self) -> None:
        """httptools holds an unfinished header, and passes over chunk extensions, without a word to us."""
        config = self._config
        if self._opaque_bytes > config.max_request_line_bytes + config.max_header_bytes + len(b"\r\n\r\n"):
            message = "The request line and headers are too long."
            self._listener.request_refused(RefusedRequest(431, message, code="headers_too_large"))

    def _ignore_upgrade(self) -> None:
        """Go on as if the request had asked for no upgrade (RFC 9110 section 7.8 lets us).

        Java's HttpClient asks for h2c with every first request. The parser, having seen Upgrade, takes the
        body for another protocol's bytes; a fresh one gets a head with the same framing instead.
        """
        self._parser = httptools.HttpRequestParser(self)
        if self.head is not None:
            self._replaying = True
            self._parser.feed_data(self.head.without_upgrade())

    # Callbacks of httptools.

    def on_message_begin(self) -> None:
        if not self._replaying:
            self.head = RequestHead(self._config)
            self._listener.request_began()

    def on_url(self, fragment: bytes) -> None:
        if not self._replaying:
            assert self.head is not None
            self.head.add_target(self._parser.get_method(), fragment)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._replaying:
            assert self.head is not None
            self.head.add_header(name, value)

    def on_headers_complete(self) -> None:
        if self._replaying:
            self._replaying = False
            return
        head = self.head
        assert head is not None
        self._opaque_bytes = 0
        head.finish(self._parser.get_http_version())
        self._body_remaining = head.content_length
        self._listener.head_received(head, keep_alive=self._parser.should_keep_alive())

    def on_chunk_header(self) -> None:
        self._opaque_bytes = 0

    def on_body(self, data: bytes) -> None:
        self._opaque_bytes = 0
        if self._body_remaining:
            self._body_remaining -= len(data)
        self._listener.body_received(data)

    def on_message_complete(self) -> None:
        assert self.head is not None
        self._opaque_bytes = 0
        if self._parser.should_upgrade() and self.head.has_body:
            return  # the body is still to come: _ignore_upgrade
        self.head = None
        self._listener.request_complete()


def _reason(error: Exception) -> HTTPStatusError:
    """Why the parser stopped: its own complaint, our refusal from a callback, or a bug in one."""
    cause = error.__context__
    if cause is None:
        return RefusedRequest(400, f"Malformed request: {error}.")
    if isinstance(cause, HTTPStatusError):
        return cause
    logger.error("exception in a parser callback", exc_info=cause)
    return InternalError("Internal server error.")
