"""The lifespan protocol: support, failure, lateness."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mlxd.server.asgi import Receive, Scope, Send
from mlxd.server.lifespan import Lifespan, StartupFailed
from tests.wire.harness import in_loop


class App:
    """Answers startup and shutdown with these messages; None answers nothing."""

    def __init__(self, startup: Any = "complete", shutdown: Any = "complete") -> None:
        self.answers = {"startup": startup, "shutdown": shutdown}
        self.heard: list[str] = []
        self.before_end: Callable[[], Awaitable[object]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "lifespan"
        assert scope["asgi"]["version"] == "3.0"
        scope["state"]["ready"] = True
        for _ in range(2):
            event = (await receive())["type"].removeprefix("lifespan.")
            self.heard.append(event)
            answer = self.answers[event]
            if isinstance(answer, Exception):
                raise answer
            if answer is None:
                await asyncio.Event().wait()
            await send({"type": f"lifespan.{event}.{answer}", "message": "the reason"})
        if self.before_end is not None:
            await self.before_end()


@in_loop
async def test_startup_and_shutdown() -> None:
    app, state = App(), {}
    lifespan = Lifespan(app, state)
    await lifespan.startup()
    assert state == {"ready": True} and app.heard == ["startup"]
    assert lifespan.task is not None and not lifespan.task.done()
    await lifespan.shutdown(10)
    assert app.heard == ["startup", "shutdown"] and lifespan.task is None
    await lifespan.shutdown(10)  # once is enough


@in_loop
async def test_an_application_without_lifespan() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    lifespan = Lifespan(app, {})
    await lifespan.startup()
    assert lifespan.task is None
    await lifespan.shutdown(10)


@in_loop
async def test_an_application_that_just_returns() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        return

    lifespan = Lifespan(app, {})
    await lifespan.startup()
    await lifespan.shutdown(10)


@pytest.mark.parametrize(
    ("answer", "reason"), [("failed", "the reason"), (ValueError("broken"), "ValueError: broken")]
)
@in_loop
async def test_startup_fails(answer: Any, reason: str) -> None:
    lifespan = Lifespan(App(startup=answer), {})
    with pytest.raises(StartupFailed, match=reason):
        await lifespan.startup()
    await lifespan.shutdown(0.01)


@pytest.mark.parametrize(
    ("answer", "logged"),
    [
        ("failed", "failed to shut down: the reason"),
        (ValueError("broken"), "ValueError: broken"),
        (None, "did not shut down within"),
        ("nonsense", "unexpected lifespan message 'lifespan.shutdown.nonsense'"),
    ],
)
@in_loop
async def test_shutdown_fails(answer: Any, logged: str, caplog: pytest.LogCaptureFixture) -> None:
    lifespan = Lifespan(App(shutdown=answer), {})
    await lifespan.startup()
    await lifespan.shutdown(0.01)
    assert logged in caplog.text


@in_loop
async def test_what_follows_the_last_answer_is_waited_for() -> None:
    app = App()
    ended = []

    async def last() -> None:
        await asyncio.sleep(0)
        ended.append(True)

    app.before_end = last
    lifespan = Lifespan(app, {})
    await lifespan.startup()
    await lifespan.shutdown(10)
    assert ended


@in_loop
async def test_a_cancelled_startup_leaves_nothing() -> None:
    lifespan = Lifespan(App(startup=None), {})
    starting = asyncio.create_task(lifespan.startup())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await lifespan.shutdown(0.01)
