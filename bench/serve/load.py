"""Sends a workload at a server: closed loop (so many at a time) or open loop (so many a second).

It does not know what the figures mean. In the open loop a request's clock starts when it was due, so that
a slow server, or a slow client, cannot hide the wait by delaying the requests that follow.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.serve.http import Address, Clock, Connection, ConnectionPool, encode_request
from bench.serve.record import Record
from bench.serve.workload import Calibration, RequestSpec, Workload

CALIBRATION_WORDS = (16, 144)


@dataclass(slots=True)
class Load:
    """What a run sent and saw. `late` is the worst delay of a due request on the client's side."""

    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    late_seconds: float = 0.0


class Client:
    """Runs requests of one workload against one address."""

    def __init__(
        self,
        address: Address,
        workload: Workload,
        *,
        clock: Clock,
        api_key: str | None = None,
        keep_alive: bool = True,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.workload = workload
        self.address = address
        self.timeout_seconds = timeout_seconds
        self.pool = ConnectionPool(address, keep_alive=keep_alive, clock=clock)
        self._clock = clock
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def run(self, spec: RequestSpec, *, due: float | None = None, stream: bool | None = None) -> Record:
        """Send one request and wait for its end, whatever it is; never raises for what a server does."""
        loop = asyncio.get_running_loop()
        stream = self.workload.stream if stream is None else stream
        path = self.workload.path
        raw = encode_request(
            self.address, "POST", path, spec.body, headers=self._headers, keep_alive=self.pool.keep_alive
        )
        start = self._clock() if due is None else due
        while True:
            record = Record(
                spec.index, start=start, stream=stream, done=loop.create_future(), cut_after=spec.cut_after
            )
            try:
                connection = await self.pool.acquire()
            except OSError as error:
                record.fail("connect", str(error), self._clock())
                return record
            reused = not connection.fresh
            await self._exchange(connection, raw, record)
            # A server may close an idle connection just as it is used again; that is nobody's error
            # (RFC 9112, 9.3.1), and no token was produced.
            if not (record.outcome == "disconnected" and reused and not connection.received):
                if spec.invalid:
                    record.judge_refusal()
                return record

    async def _exchange(self, connection: Connection, raw: bytes, record: Record) -> None:
        def cut() -> None:
            connection.cut()
            if not record.done.done():
                record.done.set_result(None)

        def time_out() -> None:
            record.fail("timeout", f"no end within {self.timeout_seconds} s", self._clock())
            cut()

        record.on_cut = cut
        timer = asyncio.get_running_loop().call_later(self.timeout_seconds, time_out)
        try:
            connection.start(raw, record)
            await record.done
        finally:
            timer.cancel()
            record.on_cut = None
            if not record.done.done():
                connection.cut()
            self.pool.release(connection)

    async def calibrate(self) -> Calibration:
        """Learn from two requests how many tokens a word of a prompt is. Raises RuntimeError on failure."""
        points = []
        for words in CALIBRATION_WORDS:
            prompt = " ".join(("time",) * words)
            record = await self.run(RequestSpec(-1, self.workload.encode(prompt, 1), None))
            if record.outcome != "ok" or not record.has_usage:
                raise RuntimeError(f"calibration failed: {record.outcome} {record.error_message}")
            points.append((words, record.prompt_tokens))
        return Calibration.fit(points[0], points[1])

    async def closed_loop(
        self, *, concurrency: int, num_requests: int | None, seconds: float | None, first_index: int = 0
    ) -> Load:
        """Keep `concurrency` requests running until `num_requests` were sent or `seconds` have passed.

        Those running at the end are waited for.
        """
        load = Load()
        started = self._clock()
        indices: Iterator[int] = itertools.count(first_index)
        if num_requests is not None:
            indices = itertools.islice(indices, num_requests)

        async def worker() -> None:
            for index in indices:
                if seconds is not None and self._clock() - started >= seconds:
                    return
                load.records.append(await self.run(self.workload.request(index)))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        load.seconds = self._clock() - started
        return load

    async def open_loop(
        self, due_times: Iterator[float], *, num_requests: int | None, seconds: float | None
    ) -> Load:
        """Send request i when `due_times` says (seconds from now), however many are still running."""
        load = Load()
        started = self._clock()

        async def one(index: int, due: float) -> None:
            spec = self.workload.request(index)
            load.late_seconds = max(load.late_seconds, self._clock() - due)
            load.records.append(await self.run(spec, due=due))

        async with asyncio.TaskGroup() as group:
            for index, offset in enumerate(due_times):
                if index == num_requests or (seconds is not None and offset >= seconds):
                    break
                due = started + offset
                await asyncio.sleep(max(0.0, due - self._clock()))
                group.create_task(one(index, due))
        load.seconds = self._clock() - started
        return load
