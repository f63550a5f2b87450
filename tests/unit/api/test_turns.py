"""Requests that come at once leave the event loop to others between one and the next."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlxd.api.body import BodyDecoder
from mlxd.api.turns import Turns
from tests.unit.api.asking import BODY, CHAT
from tests.unit.api.fakes import FakeEngine, client, make_app


class Clock:
    """Counts the turns of the running loop."""

    def __init__(self) -> None:
        self.now = 0
        self._tick()

    def _tick(self) -> None:
        self.now += 1
        asyncio.get_running_loop().call_soon(self._tick)


def test_one_begins_in_a_turn_of_the_loop_in_order() -> None:
    async def main() -> None:
        turns, clock = Turns(), Clock()
        begun: list[tuple[int, int]] = []

        async def begin(number: int) -> None:
            await turns.wait()
            begun.append((number, clock.now))

        for _ in range(2):  # once more when all are through
            begun.clear()
            await asyncio.gather(*map(begin, range(5)))
            numbers, times = zip(*begun, strict=True)
            assert numbers == (0, 1, 2, 3, 4)
            assert len(set(times)) == 5

    asyncio.run(main())


def test_who_comes_alone_does_not_wait() -> None:
    async def main() -> None:
        turns, clock = Turns(), Clock()
        await asyncio.sleep(0)
        before = clock.now
        await turns.wait()
        assert clock.now == before

    asyncio.run(main())


def test_the_turn_of_one_who_has_left_is_anothers() -> None:
    async def main() -> None:
        turns = Turns()
        tasks = [asyncio.ensure_future(turns.wait()) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        tasks[2].cancel()
        await asyncio.wait_for(tasks[3], 1)

    asyncio.run(main())


def test_requests_that_come_at_once_are_read_one_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []
    decode = BodyDecoder.decode

    async def main() -> None:
        clock = Clock()

        def watched(*args: Any) -> Any:
            times.append(clock.now)
            return decode(*args)

        monkeypatch.setattr(BodyDecoder, "decode", watched)
        async with client(make_app(FakeEngine())) as http:
            responses = await asyncio.gather(*(http.post(CHAT, json=BODY) for _ in range(5)))
        assert {response.status_code for response in responses} == {200}

    asyncio.run(main())
    assert len(set(times)) == 5
