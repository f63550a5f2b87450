"""One HTTP request and its response over ASGI: headers, a bounded body, JSON answers and event streams.

It does not know routes, dialects or what is served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any, TypedDict, TypeVar

import orjson

from mlxd.api.caller import NOBODY, Caller
from mlxd.asgi_extensions import ACCESS_EXTENSION, WRITE_EXTENSION
from mlxd.errors import (
    ClientClosedRequest,
    InvalidRequestError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
)
from mlxd.request_ids import new_request_id, sane_request_id

T = TypeVar("T")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = b"application/json"
EVENT_STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class AccessFields(TypedDict, total=False):
    """What the application adds to a request's access line."""

    client: str
    """in place of the connection's other end: whom a trusted proxy named"""
    request_id: str
    key: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    error: str
    """an error's code, also of one that came after the status"""
    status: int
    """of the answer that the server gave in the application's place: to a body too slow or malformed"""


class HTTPRequest:
    """A request with the means to answer it once.

    `peer` is the address of the connection's other end (None on a Unix socket), `caller` who asks. `route` is
    the path as the route has it, `path_param` the part that it left open. `status` is that of the response,
    once it has started. Writing to a client that has left raises `ClientClosedRequest`.
    """

    __slots__ = (
        "_headers",
        "_receive",
        "_send",
        "_write",
        "access",
        "arrival_time",
        "caller",
        "client_gone",
        "method",
        "path",
        "path_param",
        "peer",
        "request_id",
        "response_complete",
        "response_headers",
        "route",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
        self._receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        self.route = ""
        self.path_param = ""
        client = scope.get("client")
        self.peer: str | None = client[0] if client else None
        self.caller: Caller = NOBODY
        extensions = scope.get("extensions", {})
        self.access: AccessFields = extensions.get(ACCESS_EXTENSION, {})
        self._write: Callable[[bytes], bool] | None = extensions.get(WRITE_EXTENSION)
        self.arrival_time: float
        """when all of its body was there, by the event loop's clock; once that has been read"""
        self.client_gone = False
        self.status = 0
        self.response_complete = False
        self.request_id = self.access["request_id"] = sane_request_id(self._headers) or new_request_id()
        self.response_headers: Headers = [(b"x-request-id", self.request_id.encode())]

    def header(self, name: bytes) -> bytes | None:
        """The first header of that (lower-case) name."""
        for key, value in self._headers:
            if key == name:
                return value
        return None

    def header_values(self, name: bytes) -> list[bytes]:
        """All headers of that (lower-case) name, in their order."""
        return [value for key, value in self._headers if key == name]

    @property
    def response_started(self) -> bool:
        return self.status != 0

    @property
    def refused(self) -> bool:
        """Whether the server has answered itself, so that the client seems to have left."""
        return "status" in self.access

    async def read_json_body(self, max_bytes: int) -> bytes:
        """The whole body, not yet decoded.

        Raises:
            UnsupportedMediaTypeError: a Content-Type that is not JSON (none at all is tolerated), or a
                compressed body (RFC 9110, 8.4).
            PayloadTooLargeError: more than `max_bytes`, by Content-Length or in fact.
            ClientClosedRequest: the client left before the end of its body.
        """
        content_type = self.header(b"content-type")
        if content_type:
            media_type = content_type.split(b";", 1)[0].strip().lower()
            if media_type != JSON and not (
                media_type.startswith(b"application/") and media_type.endswith(b"+json")
            ):
                raise UnsupportedMediaTypeError(
                    f"content-type is {media_type.decode('latin-1')!r}; send application/json"
                )
        coding = (self.header(b"content-encoding") or b"identity").strip().lower()
        if coding != b"identity":
            raise UnsupportedMediaTypeError(
                f"content-encoding is {coding.decode('latin-1')!r}; send the body uncompressed"
            )
        declared = self.header(b"content-length")
        if declared is not None:
            if not declared.isdigit():
                raise InvalidRequestError("content-length is not a number")
            if len(declared) > 18 or int(declared) > max_bytes:
                raise PayloadTooLargeError(f"the body is larger than {max_bytes} bytes")
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.client_gone = True
                raise ClientClosedRequest("the client left before the end of its body")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > max_bytes:
                raise PayloadTooLargeError(f"the body is larger than {max_bytes} bytes")
            chunks.append(chunk)
            if not message.get("more_body", False):
                self.arrival_time = asyncio.get_running_loop().time()
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def receive(self) -> Message:
        """The next ASGI message."""
        return await self._receive()

    async def disconnected(self) -> None:
        """Wait until the client has left, and note that it has. For after the body has been read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.client_gone = True

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; it is cancelled when the client leaves. For after the body has been read.

        Raises ClientClosedRequest then, and what `work` does.
        """
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        watcher = loop.create_task(self.disconnected())
        try:
            await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientClosedRequest("the client left")
        finally:
            watcher.cancel()
            task.cancel()

    async def respond(
        self, status: int, body: bytes, content_type: bytes = JSON, headers: Headers | None = None
    ) -> None:
        """The whole answer at once. A HEAD request gets the headers of it."""
        head = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
            *(headers or ()),
        ]
        await self._start(status, head)
        await self.send_chunk(b"" if self.method == "HEAD" else body, more=False)

    async def respond_json(self, status: int, value: object, headers: Headers | None = None) -> None:
        await self.respond(status, orjson.dumps(value), headers=headers)

    async def respond_empty(self, headers: Headers, *, status: int = 204) -> None:
        """204 or 304, no body."""
        await self._start(status, headers)
        await self.send_chunk(b"", more=False)

    async def start_event_stream(self) -> None:
        """Status 200 and the headers of an SSE answer; `send_chunk` follows."""
        await self._start(200, EVENT_STREAM_HEADERS)

    async def send_chunk(self, body: bytes, *, more: bool = True) -> None:
        """A piece of the body; waits while the client is slow."""
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except OSError as error:  # ASGI 2.4: what send() raises once the client has left
            self.client_gone = True
            raise ClientClosedRequest("the client left") from error
        self.response_complete = not more

    def write_chunk(self, body: bytes) -> bool:
        """`send_chunk` of a piece that is not the last, where that takes no waiting; whether it was sent."""
        return self._write is not None and self._write(body)

    async def _start(self, status: int, headers: Headers) -> None:
        self.status = status
        try:
            await self._send(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": [*headers, *self.response_headers, *self.caller.account.headers()],
                }
            )
        except OSError as error:
            self.client_gone = True
            raise ClientClosedRequest("the client left") from error
