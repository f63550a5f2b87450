"""A scripted OpenAI server for the load generator's tests: raw asyncio, bytes as the test says.

It does not know chat: it counts connections and requests, and answers with what `reply` gives.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson


@dataclass(slots=True)
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, object]


@dataclass(slots=True)
class FakeServer:
    """`reply(request)` gives the pieces to write, one write each; None closes the connection there."""

    reply: Callable[[Request], list[bytes | None]]
    url: str = ""
    num_connections: int = 0
    requests: list[Request] = field(default_factory=list)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                request = Request(head[0].split(" ")[1], headers, orjson.loads(body))
                self.requests.append(request)
                for piece in self.reply(request):
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if headers.get("connection") == "close":
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def fake_server(
    reply: Callable[[Request], list[bytes | None]], *, unix_socket: str | None = None
) -> AsyncIterator[FakeServer]:
    server = FakeServer(reply)
    if unix_socket is not None:
        listener = await asyncio.start_unix_server(server._serve, unix_socket)
        server.url = f"unix:{unix_socket}"
    else:
        listener = await asyncio.start_server(server._serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def delta(text: str) -> bytes:
    return (
        b"data: "
        + orjson.dumps({"choices": [{"index": 0, "delta": {"content": text}}], "usage": None})
        + b"\n\n"
    )


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    fields = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return b"data: " + orjson.dumps({"choices": [], "usage": fields}) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def stream(*texts: str, prompt_tokens: int = 7, completion_tokens: int | None = None) -> list[bytes | None]:
    """A whole good answer, a write for each frame."""
    count = len(texts) if completion_tokens is None else completion_tokens
    frames = [*(delta(text) for text in texts), usage(prompt_tokens, count), DONE]
    return [HEAD, *(chunk(frame) for frame in frames), END]


def whole(status: int, body: object) -> list[bytes | None]:
    """An answer with a length."""
    data = orjson.dumps(body)
    return [b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(data), data)]
