"""The embedding worker's loop: batches in, vectors out, one after another.

It does not know MLX: an embedder is anything that can compute a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from mlxd.step import EmbedBatch, EmbedResult, Message, Shutdown, ToWorker
from mlxd.worker.channel import Channel, ProtocolError
from mlxd.worker.heartbeat import Activity


class BatchRunner(Protocol):
    """What computes batches."""

    def run(self, batch: EmbedBatch, /) -> EmbedResult:
        """Computes it and waits for it. The time is filled in by the loop."""


class EmbedLoop:
    """Runs until Shutdown or the end of the channel. A batch that raises ends it with that exception."""

    def __init__(
        self,
        channel: Channel[ToWorker],
        runner: BatchRunner,
        activity: Activity,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._runner = runner
        self._activity = activity
        self._clock = clock

    def run(self) -> None:
        """Returns after Shutdown; EOFError when the front is gone."""
        while True:
            message = self._channel.receive()
            if isinstance(message, Shutdown):
                return
            if not isinstance(message, EmbedBatch):
                raise ProtocolError(f"unexpected {type(message).__name__}")
            started = self._clock()
            self._activity.begin(message.batch_id, started)
            result: Message = msgspec.structs.replace(
                self._runner.run(message), seconds=self._clock() - started
            )
            self._activity.end()
            self._channel.send(result)
