"""The way outputs reach whoever submitted the requests: one stream for all sequences of one client call.

It does not know tokens' meaning or HTTP. All methods belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxd.engine.request import RequestOutput

BACKLOG_TOKENS = 2048
"""Unread tokens above which a stream's requests are paused: memory stays bounded, work is not wasted."""


class OutputStream:
    """Async iterator of lists of outputs: everything new since the last list, in order.

    It ends after every request of the stream had its output with a finish_reason. A reader that lags gets
    the outputs of one request merged, so that what is kept for it is at most its text and tokens.
    """

    __slots__ = (
        "_loop",
        "_num_open",
        "_num_read_tokens",
        "_on_cancel",
        "_on_drained",
        "_ready",
        "_unread",
        "_waiter",
        "_waits_to_begin",
        "has_begun",
        "num_unread_tokens",
    )

    def __init__(
        self,
        num_requests: int,
        loop: asyncio.AbstractEventLoop,
        *,
        on_cancel: Callable[[OutputStream], None],
        on_drained: Callable[[OutputStream], None],
    ) -> None:
        self._loop = loop
        self._num_open = num_requests
        self._on_cancel = on_cancel
        self._on_drained = on_drained
        self._ready: list[RequestOutput] = []
        self._unread: list[RequestOutput | None] = [None] * num_requests
        """the same by the request's index: a stream may have hundreds, all with news in one step"""
        self._waiter: asyncio.Future[None] | None = None
        self.num_unread_tokens = 0
        self._num_read_tokens = 0
        self._waits_to_begin = False
        self.has_begun = False
        """the worker has been asked to compute a part of the first prompt"""

    @property
    def num_tokens(self) -> int:
        """Tokens of all requests so far."""
        return self._num_read_tokens + self.num_unread_tokens

    @property
    def is_finished(self) -> bool:
        """Whether every request has ended; outputs may still be unread."""
        return self._num_open == 0

    @property
    def is_backlogged(self) -> bool:
        return self.num_unread_tokens > BACKLOG_TOKENS

    def push(self, output: RequestOutput) -> None:
        """Add an output and wake the reader."""
        waiting = self._unread[output.index]
        if waiting is None:
            self._unread[output.index] = output
            self._ready.append(output)
        else:
            waiting.absorb(output)
        self.num_unread_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._num_open -= 1
        self.wake()

    def begin(self) -> None:
        """Its first prompt is being computed; later calls change nothing."""
        self.has_begun = True
        if self._waits_to_begin:
            self.wake()

    async def wait_begun(self) -> None:
        """Until it has begun or has something to read, or `wake`. For the reader, before it reads."""
        if self.has_begun or self._ready or not self._num_open:
            return
        self._waits_to_begin = True
        await self.news()
        self._waits_to_begin = False

    def news(self) -> asyncio.Future[None]:
        """Done once there is something to `take`, or after `wake`. For whoever has taken all there was."""
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def take(self) -> list[RequestOutput]:
        """Everything new since the last time, which may be nothing."""
        ready, self._ready = self._ready, []
        for output in ready:
            self._unread[output.index] = None
        num_tokens = self.num_unread_tokens
        self._num_read_tokens += num_tokens
        self.num_unread_tokens = 0
        if num_tokens > BACKLOG_TOKENS:
            self._on_drained(self)
        return ready

    def wake(self) -> None:
        """Let a waiting reader go on; where nothing is new, it gets an empty list."""
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def cancel(self) -> None:
        """Abort what still runs. The stream then ends with one abort output a request. Idempotent."""
        if self._num_open:
            self._on_cancel(self)

    async def drain(self) -> None:
        """Read it to its end, where outputs do not matter; what still runs when this is left is aborted.

        Raises the error that a request ended with.
        """
        try:
            async for outputs in self:
                for output in outputs:
                    if output.error is not None:
                        raise output.error
        finally:
            self.cancel()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> list[RequestOutput]:
        if not self._ready:
            if self._num_open == 0:
                raise StopAsyncIteration
            await self.news()
        return self.take()
