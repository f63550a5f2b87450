"""Requests that come at once begin one after another, with a turn of the event loop between any two.

It does not know what a request does. To read one, render its conversation and find its tokens takes up to
some milliseconds, in which no stream hears of its tokens and no worker of its next step; a hundred in one
turn of the loop would be a pause that everybody sees.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """One for an event loop."""

    __slots__ = ("_is_free", "_waiting")

    def __init__(self) -> None:
        self._is_free = True
        """whether nobody has begun in this turn of the loop, and so nobody waits"""
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """For a turn of the event loop in which no other request begins; whoever came first goes first."""
        loop = asyncio.get_running_loop()
        if self._is_free:
            self._is_free = False
            loop.call_soon(self._pass_on, loop)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _pass_on(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # done: its request was cancelled
                # Who waits for it runs in the loop's next turn, once sockets have been looked at, and this
                # behind it.
                turn.set_result(None)
                loop.call_soon(self._pass_on, loop)
                return
        self._is_free = True
