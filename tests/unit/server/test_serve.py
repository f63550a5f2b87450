"""serve(): one process's whole life, with real signals; and Server's start."""

from __future__ import annotations

import asyncio
import functools
import http.client
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxd import server
from mlxd.config import ServerConfig
from mlxd.server import StartupFailed
from mlxd.server.asgi import Receive, Scope, Send
from tests.wire.harness import describe_error, in_loop, read_body, respond

Server = functools.partial(server.Server, describe_error=describe_error)
serve = functools.partial(server.serve, describe_error=describe_error)

LOCAL = ServerConfig(host="127.0.0.1", port=0, shutdown_seconds=10)


class App:
    """Counts lifespan events; /hang streams until it is told to end."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.hanging = threading.Event()
        self.end = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
        elif scope["path"] == "/hang":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
            self.hanging.set()
            await self.end.wait()
            await send({"type": "http.response.body", "body": b"ended"})
        else:
            await respond(send, body=await read_body(receive) or b"ok")

    async def lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            self.events.append(kind)
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return


class Client(threading.Thread):
    """Asks from another thread, as on_listening must not block, then does what comes after."""

    def __init__(self, path: str, then: Callable[[], None]) -> None:
        super().__init__()
        self.path = path
        self.then = then
        self.port = 0
        self.answer: bytes | None = None

    def listening(self, url: str) -> None:
        self.port = int(url.rpartition(":")[2])
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", self.path)
        threading.Thread(target=self.then).start()
        try:
            self.answer = connection.getresponse().read()
        except (http.client.HTTPException, ConnectionError):
            self.answer = None
        finally:
            connection.close()


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(number: int, caplog: pytest.LogCaptureFixture) -> None:
    app = App()
    served = threading.Event()

    def then() -> None:
        served.wait(10)
        kill(number)

    client = Client("/", then)
    with caplog.at_level(logging.INFO, logger="mlxd.access"):
        access_log = logging.getLogger("mlxd.access")
        # A shell's background job inherits SIGINT ignored, which uvloop does not bring back.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        access_log.addFilter(lambda record: served.set() or True)
        try:
            assert serve(app, LOCAL, on_listening=client.listening, access_log=access_log) == 0
        finally:
            access_log.filters.clear()
    client.join(10)
    assert client.answer == b"ok"
    assert app.events == ["lifespan.startup", "lifespan.shutdown"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    [record] = [record for record in caplog.records if record.name == "mlxd.access"]
    assert record.__dict__["path"] == "/"


def test_a_running_stream_gets_its_last_frame() -> None:
    app = App()

    def then() -> None:
        app.hanging.wait(10)
        kill(signal.SIGTERM)

    client = Client("/hang", then)
    config = ServerConfig(host="127.0.0.1", port=0, shutdown_seconds=0)
    assert serve(app, config, on_listening=client.listening, on_shutdown_deadline=app.end.set) == 0
    client.join(10)
    assert client.answer == b"begun ended"


def test_a_second_signal_does_not_wait() -> None:
    app = App()
    deadlines: list[int] = []

    def then() -> None:
        app.hanging.wait(10)
        kill(signal.SIGTERM)
        kill(signal.SIGINT)

    client = Client("/hang", then)
    config = ServerConfig(host="127.0.0.1", port=0, shutdown_seconds=1000)
    on_deadline = lambda: deadlines.append(1)  # noqa: E731
    assert serve(app, config, on_listening=client.listening, on_shutdown_deadline=on_deadline) == 0
    client.join(10)
    assert client.answer is None and deadlines == [1]
    assert app.events == ["lifespan.startup", "lifespan.shutdown"]


def test_a_signal_during_startup() -> None:
    class Slow(App):
        async def lifespan(self, receive: Receive, send: Send) -> None:
            await receive()
            kill(signal.SIGTERM)
            try:
                await asyncio.Event().wait()
            finally:
                self.events.append("cancelled")

    listening: list[str] = []
    slow = Slow()
    assert serve(slow, LOCAL, on_listening=listening.append) == 0
    assert not listening
    assert slow.events == ["cancelled"]


def test_startup_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(App):
        async def lifespan(self, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "no model"})

    assert serve(Broken(), LOCAL) == 1
    assert "no model" in caplog.text


def test_an_application_that_breaks_down_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    class Dying(App):
        async def lifespan(self, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            for _ in range(100):  # long enough to be started
                await asyncio.sleep(0)
            raise RuntimeError("the engine died")

    assert serve(Dying(), LOCAL) == 1
    assert "the engine died" in caplog.text and "did not start" not in caplog.text


def test_an_application_without_lifespan_is_served() -> None:
    class Plain(App):
        async def lifespan(self, receive: Receive, send: Send) -> None:
            raise NotImplementedError

    assert serve(Plain(), LOCAL, on_listening=lambda url: kill(signal.SIGTERM)) == 0


def test_a_finished_lifespan_is_no_failure() -> None:
    class Brief(App):
        async def lifespan(self, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "lifespan.startup.complete"})

    assert serve(Brief(), LOCAL, on_listening=lambda url: kill(signal.SIGTERM)) == 0


def test_the_address_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServerConfig(host="127.0.0.1", port=taken.getsockname()[1])
        app = App()
        with pytest.raises(OSError, match="in use"):
            serve(app, config)
    assert not app.events, "nothing slow is begun before the address is sure"


@in_loop
async def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed"})

    server = Server(app, ServerConfig(unix_socket=str(tmp_path / "s")))
    assert (server.num_connections, server.num_exchanges, server.lifespan_task) == (0, 0, None)
    with pytest.raises(StartupFailed, match="gave no reason"):
        await server.start()
    assert server.sockets[0].fileno() == -1
    assert not (tmp_path / "s").exists()


@in_loop
async def test_a_server_is_started_before_it_is_shut_down() -> None:
    with pytest.raises(AssertionError, match="start"):
        await Server(App(), LOCAL).shutdown()
