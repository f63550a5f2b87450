"""The lifespan protocol of ASGI: one startup and one shutdown around the server's life.

It does not know sockets or requests. A failed startup is the caller's to report.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from mlxd.server.asgi import ASGI_VERSIONS, Application, Message

logger = logging.getLogger("mlxd.server")


class StartupFailed(Exception):
    """The application said, or showed by an exception, that it cannot serve."""


class Lifespan:
    """Runs the application's lifespan call as one task.

    An application that raises before it asks for the first event does not support lifespan; by the
    specification the server then goes on without it. `task` ends after shutdown; if it raises earlier, the
    application is broken and the server should stop.
    """

    def __init__(self, app: Application, state: dict[str, Any]) -> None:
        self.state = state
        self.task: asyncio.Task[None] | None = None
        self._app = app
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._answered = asyncio.Event()
        self._failure: str | None = None
        self._asked = False
        self._started = False

    async def startup(self) -> None:
        """Returns when the application is ready; raises StartupFailed when it never will be."""
        self._events.put_nowait({"type": "lifespan.startup"})
        self.task = asyncio.create_task(self._run(), name="lifespan")
        self.task.add_done_callback(lambda _: self._answered.set())
        await self._answered.wait()
        self._started = True
        if self._failure is not None:
            raise StartupFailed(self._failure)
        if self.task.done() and (error := self.task.exception()) is not None:
            if self._asked:
                raise StartupFailed(f"{type(error).__name__}: {error}") from error
            logger.debug("the application does not support lifespan: %r", error)
            self.task = None

    async def shutdown(self, timeout_seconds: float) -> None:
        """Ask the application to clean up and wait for it. Late, or never started, it is cancelled."""
        task, self.task = self.task, None
        if task is None:
            return
        try:
            if self._started and not task.done():
                self._answered.clear()
                self._events.put_nowait({"type": "lifespan.shutdown"})
                async with asyncio.timeout(timeout_seconds):
                    await self._answered.wait()
                if self._failure is not None:
                    logger.error("the application failed to shut down: %s", self._failure)
                await asyncio.wait({task}, timeout=timeout_seconds)
        except TimeoutError:
            logger.error("the application did not shut down within %.0f s", timeout_seconds)
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("the application's lifespan ended with an exception", exc_info=error)

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": ASGI_VERSIONS, "state": self.state}
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        self._asked = True
        return await self._events.get()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
            self._failure = message.get("message") or "the application gave no reason"
        elif kind not in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
            raise RuntimeError(f"unexpected lifespan message {kind!r}")
        self._answered.set()
