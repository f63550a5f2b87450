"""The whole front without sockets or processes: server, API and engine over a checksum worker.

Bytes go in at one end and plans come out at the other; time stands still unless told.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from mlxd.api.app import App, create_app
from mlxd.config import Config
from mlxd.server.context import ServerContext
from mlxd.server.responses import DateLine
from tests.unit.engine.conftest import Harness
from tests.wire import harness as wire

ACCESS_LOGGER = "test.access"


class Stack(Harness):
    """An engine, the app over it and a server in front; `connect()` is a client."""

    def __init__(self, config: Config, folder: Path, **options: Any) -> None:
        super().__init__(config, folder, **options)
        numbers = iter(range(1, 1_000_000))
        self.app: App = create_app(
            config,
            self.engine,
            now=lambda: 1e9,
            clock=lambda: self.time,
            new_id=lambda: f"{next(numbers):032x}",
        )
        self.context = ServerContext(
            app=self.app,
            config=config.server,
            loop=asyncio.get_running_loop(),
            clock=lambda: self.time,
            date_line=DateLine(lambda: 0.0),
            describe_error=self.app.describe_error,
            access_log=logging.getLogger(ACCESS_LOGGER),
        )

    def connect(self) -> Client:
        return Client(self)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> wire.Response:
        """One request on a connection of its own, and its answer."""
        client = self.connect()
        await client.send(method, path, body, **headers)
        return await client.response()


class Client(wire.Wire):
    """One connection."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        super().__init__(stack.app, context=stack.context)

    async def send(  # type: ignore[override]
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> None:
        payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"host": "h", "content_length": str(len(payload)), **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items())]
        await self.send_raw("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)

    async def send_raw(self, data: bytes) -> None:
        await super().send(data)

    async def response(self) -> wire.Response:
        """The last answer, once it is complete."""
        await self.stack.until(lambda: bool(self.output) and self.responses()[-1].complete)
        return self.responses()[-1]


Play = Callable[[Stack], Awaitable[None]]


@asynccontextmanager
async def running(folder: Path, settings: dict[str, Any], **options: Any) -> AsyncIterator[Stack]:
    """A stack that is ready; afterwards nothing may be left in the engine or the loop."""
    stack = Stack(msgspec.convert(settings, Config), folder, **options)
    await stack.engine.start()
    try:
        await stack.until(stack.is_ready, turns=50)
        yield stack
    finally:
        for connection in list(stack.context.connections):
            connection.abort()
        await stack.engine.stop(0)
        await wire.settle()
        assert stack.engine.stats.num_integrity_errors == 0
        assert stack.engine.requests() == []
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left: {left}"
        loop: Any = asyncio.get_running_loop()
        timers = [timer for timer in loop._scheduled if not timer.cancelled()]
        assert not timers, f"timers left: {timers}"


def play(scenario: Play, folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> None:
    async def main() -> None:
        async with running(folder, settings or {}, **options) as stack:
            await scenario(stack)

    asyncio.run(main())


def error_of(response: wire.Response) -> dict[str, Any]:
    """The error of an answer in OpenAI's dialect, whose shape is checked."""
    body = json.loads(response.body)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error
