"""The embedding worker's loop: every batch answered in order, and nothing else understood."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from mlxd.step import EmbedBatch, EmbedResult, Flush, FromWorker, Shutdown, ToWorker
from mlxd.worker.channel import Channel, ProtocolError
from mlxd.worker.embeddings.loop import EmbedLoop
from mlxd.worker.heartbeat import Activity


class Runner:
    def __init__(self, activity: Activity) -> None:
        self.activity = activity
        self.busy: list[int] = []

    def run(self, batch: EmbedBatch) -> EmbedResult:
        self.busy.append(self.activity.beat(0).step_id)
        return EmbedResult(batch.batch_id, batch.lengths)


@pytest.fixture
def ends() -> Iterator[tuple[Channel[FromWorker], Channel[ToWorker]]]:
    ours, theirs = socket.socketpair()
    front: Channel[FromWorker] = Channel(ours, FromWorker)  # type: ignore[arg-type]
    worker: Channel[ToWorker] = Channel(theirs, ToWorker)  # type: ignore[arg-type]
    yield front, worker
    front.close()
    worker.close()


def test_batches_are_answered_in_order_with_their_time(
    ends: tuple[Channel[FromWorker], Channel[ToWorker]],
) -> None:
    front, worker = ends
    activity, clock = Activity(), iter(range(10))
    runner = Runner(activity)
    for batch_id in (1, 2):
        front.send(EmbedBatch(batch_id, b"\1\0\0\0", b"\7\0\0\0"))
    front.send(Shutdown())
    EmbedLoop(worker, runner, activity, clock=lambda: next(clock)).run()
    assert [front.receive(), front.receive()] == [
        EmbedResult(1, b"\1\0\0\0", seconds=1),
        EmbedResult(2, b"\1\0\0\0", seconds=1),
    ]
    assert runner.busy == [1, 2] and activity.beat(0).busy_seconds == 0


def test_a_message_for_another_worker_is_an_error(
    ends: tuple[Channel[FromWorker], Channel[ToWorker]],
) -> None:
    front, worker = ends
    front.send(Flush())
    with pytest.raises(ProtocolError, match="unexpected Flush"):
        EmbedLoop(worker, Runner(Activity()), Activity()).run()
    front.close()
