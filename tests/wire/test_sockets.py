"""The same over real sockets and uvloop: what a fake transport cannot show."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from mlxd.config import ServerConfig
from mlxd.server import Server
from mlxd.server.asgi import Receive, Scope, Send
from tests.wire.harness import Puppet, Recorder, describe_error, read_responses

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def on_uvloop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(20):
                await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    return run


@contextlib.asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[Server]:
    on_shutdown_deadline = options.pop("on_shutdown_deadline", None)
    config = ServerConfig(**{"host": "127.0.0.1", "port": 0, "shutdown_seconds": 0.01, **options})
    server = Server(
        no_lifespan(app), config, describe_error=describe_error, on_shutdown_deadline=on_shutdown_deadline
    )
    await server.start()
    try:
        yield server
    finally:
        await server.shutdown()
        await asyncio.sleep(0)
        assert server.num_connections == server.num_exchanges == 0


def no_lifespan(app: Any) -> Any:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        await app(scope, receive, send)

    return wrapped


def address(server: Server) -> tuple[str, int]:
    host, port = server.sockets[0].getsockname()[:2]
    return host, port


async def connect(server: Server) -> Streams:
    return await asyncio.open_connection(*address(server), limit=1024)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    """Something that another process or the kernel has a part in; bounded by the test's timeout."""
    while not condition():
        await asyncio.sleep(0.001)


@on_uvloop
async def test_httpx_and_keep_alive() -> None:
    app = Recorder(body=b"x" * 100_000)
    async with serving(app) as server, httpx.AsyncClient(base_url=server.url) as client:
        for n in range(3):
            response = await client.post(f"/{n}", content=b"y" * 200_000)
            assert (response.status_code, len(response.content)) == (200, 100_000)
        assert len({scope["client"] for scope in app.scopes}) == 1
        assert app.scopes[0]["server"] == address(server)
        assert [len(body) for body in app.bodies] == [200_000] * 3


@on_uvloop
async def test_small_writes_are_not_delayed() -> None:
    app = Puppet()
    async with serving(app) as server:
        reader, writer = await connect(server)
        writer.write(GET)
        await until(lambda: bool(app.calls))
        [exchange] = server._context.exchanges  # type: ignore[union-attr]
        sock = exchange.flow.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        assert server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) != 0
        await app.calls[0].respond()
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        await close(writer)


@on_uvloop
async def test_a_slow_reader_costs_bounded_memory_and_stops_only_itself() -> None:
    total, frame = 64 << 20, b"x" * 16384
    sent: dict[str, int] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(total // len(frame)):
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            sent[scope["path"]] = sent.get(scope["path"], 0) + len(frame)
        await send({"type": "http.response.body"})

    async with serving(app, write_buffer_bytes=65536) as server:
        slow = socket.create_connection(address(server))
        slow.sendall(b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n")
        await until(lambda: "/slow" in sent)
        reader, writer = await connect(server)
        writer.write(b"GET /fast HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        size = 0
        while data := await reader.read(1 << 20):
            size += len(data)
        assert size > total
        assert sent["/slow"] < total, "the kernel's buffers hold some, the server 64 KiB"
        [exchange] = server._context.exchanges  # type: ignore[union-attr]
        assert exchange.flow.transport.get_write_buffer_size() <= 65536 + 2 * len(frame)
        slow.close()
        await close(writer)
        await until(lambda: server.num_exchanges == 0)


@on_uvloop
async def test_a_stalled_reader_is_cut_off_by_the_sweep() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    async with serving(app, write_timeout_seconds=0.2) as server:
        with socket.create_connection(address(server)) as slow:
            slow.sendall(GET)
            await until(lambda: server.num_exchanges == 1)
            await until(lambda: server.num_exchanges == 0)


@on_uvloop
async def test_a_refusal_is_read_although_the_client_goes_on_sending() -> None:
    """Closing at once would reset the connection and take the answer away."""
    async with serving(Recorder(), max_body_bytes=1000) as server:

        def upload() -> bytes:
            with socket.create_connection(address(server)) as client:
                client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4000000\r\n\r\n")
                client.sendall(b"x" * 4_000_000)
                client.shutdown(socket.SHUT_WR)
                answer = b""
                while data := client.recv(65536):
                    answer += data
                return answer

        [response] = read_responses(await asyncio.to_thread(upload))
        assert response.status == 413


@on_uvloop
async def test_a_disconnect_reaches_the_application() -> None:
    app = Puppet()
    async with serving(app) as server:
        _, writer = await connect(server)
        writer.write(GET * 3)
        await until(lambda: bool(app.calls))
        await app.calls[0].receive()
        await close(writer)
        assert (await app.calls[0].receive())["type"] == "http.disconnect"
        await app.calls[0].finish()
        assert len(app.calls) == 1


@on_uvloop
async def test_limits_by_the_real_clock() -> None:
    async with serving(Recorder(), header_timeout_seconds=0.1) as server:
        reader, writer = await connect(server)
        writer.write(b"GET / HTTP/1.1\r\n")
        assert [r.status for r in read_responses(await reader.read())] == [408]
        await close(writer)


@on_uvloop
async def test_shutdown_lets_streams_finish() -> None:
    app = Puppet()
    async with serving(app, shutdown_seconds=15) as server:
        reader, writer = await connect(server)
        idle_reader, idle_writer = await connect(server)
        writer.write(GET)
        await until(lambda: bool(app.calls) and server.num_connections == 2)
        [call] = app.calls
        await call.start()
        await call.body(b"before ", more=True)
        ending = asyncio.create_task(server.shutdown())
        assert await idle_reader.read() == b""
        with pytest.raises(OSError):
            await connect(server)
        await call.body(b"after", more=True)
        assert not ending.done()
        await call.body(b"")
        await call.finish()
        await ending
        [response] = read_responses(await reader.read())
        assert response.body == b"before after" and response.complete
        await close(writer)
        await close(idle_writer)


@pytest.mark.parametrize("in_a_hurry", [False, True])
@on_uvloop
async def test_at_the_deadline_the_application_ends_its_streams(in_a_hurry: bool) -> None:
    deadline = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"token", "more_body": True})
        await deadline.wait()
        await send({"type": "http.response.body", "body": b"[DONE]"})

    seconds, at_once = (100, asyncio.Event()) if in_a_hurry else (0.05, None)
    async with serving(app, shutdown_seconds=seconds, on_shutdown_deadline=deadline.set) as server:
        reader, writer = await connect(server)
        writer.write(GET)
        await reader.readuntil(b"token")
        if at_once is not None:
            at_once.set()
        await server.shutdown(at_once=at_once)
        assert (await reader.read()).endswith(b"6\r\n[DONE]\r\n0\r\n\r\n")
        await close(writer)


@on_uvloop
async def test_what_ignores_the_deadline_is_cancelled_soon_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxd.server.server.HURRIED_SECONDS", 0.01)
    app = Puppet()
    calls = []
    async with serving(app, shutdown_seconds=100, on_shutdown_deadline=lambda: calls.append(1)) as server:
        reader, writer = await connect(server)
        writer.write(GET)
        await until(lambda: bool(app.calls))
        at_once = asyncio.Event()
        ending = asyncio.create_task(server.shutdown(at_once=at_once))
        await asyncio.sleep(0)
        at_once.set()
        await ending
        assert calls == [1]
        assert [r.status for r in read_responses(await reader.read())] == [503]
        await close(writer)


@on_uvloop
async def test_what_clings_to_life_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxd.server.server.LAST_FRAME_SECONDS", 0.05)
    monkeypatch.setattr("mlxd.server.server.CANCEL_SECONDS", 0.05)
    release = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"token", "more_body": True})
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    async with serving(app) as server:
        reader, writer = await connect(server)
        writer.write(GET)
        await reader.readuntil(b"token")
        await server.shutdown()
        assert server.num_exchanges == 1
        release.set()
        await until(lambda: server.num_exchanges == 0)
        assert not (await reader.read()).endswith(b"0\r\n\r\n")
        await close(writer)


@on_uvloop
async def test_a_reader_that_does_not_finish_cannot_hold_up_the_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlxd.server.server.LAST_FRAME_SECONDS", 0.05)
    monkeypatch.setattr("mlxd.server.server.CANCEL_SECONDS", 0.05)
    app = Recorder(body=b"x" * (32 << 20))
    async with serving(app) as server:
        with socket.create_connection(address(server)) as slow:
            slow.sendall(GET)
            await until(lambda: bool(app.bodies) and server.num_exchanges == 0)
            assert server.num_connections == 1
            await server.shutdown()
            await until(lambda: server.num_connections == 0)


@on_uvloop
async def test_unix_socket(tmp_path: Path) -> None:
    socket_path = tmp_path / "mlxd.sock"
    path = str(socket_path)
    app = Recorder()
    async with serving(app, unix_socket=path) as server:
        assert server.url == f"unix:{path}"
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.get("/a")).text == "ok"
        assert app.scopes[0]["client"] is None
        assert app.scopes[0]["server"] == (path, None)
    assert not socket_path.exists()


@pytest.mark.parametrize(("access", "mode"), [("owner", 0o600), ("group", 0o660), ("all", 0o666)])
@on_uvloop
async def test_who_may_connect_to_a_unix_socket(tmp_path: Path, access: str, mode: int) -> None:
    socket_path = tmp_path / "mlxd.sock"
    async with serving(Recorder(), unix_socket=str(socket_path), unix_socket_access=access):
        assert stat.S_IMODE(socket_path.stat().st_mode) == mode


@on_uvloop
async def test_localhost_serves_every_family_on_one_port() -> None:
    async with serving(Recorder(), host="localhost") as server:
        ports = {sock.getsockname()[1] for sock in server.sockets}
        assert len(ports) == 1 and server.url == f"http://localhost:{ports.pop()}"
        for sock in server.sockets:
            async with httpx.AsyncClient() as client:
                host = "[::1]" if sock.family == socket.AF_INET6 else "127.0.0.1"
                assert (await client.get(f"http://{host}:{sock.getsockname()[1]}/")).text == "ok"
