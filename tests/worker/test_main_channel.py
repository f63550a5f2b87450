"""Framing: whole, one byte at a time, cut off, too long, not a message, from several threads."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from mlxd.step import Flush, FromWorker, Heartbeat, Shutdown, StepPlan, ToWorker, WorkerFailure
from mlxd.worker.channel import HEADER, Channel, ProtocolError
from tests.worker.worker_plans import Row, step_plan

PLAN = step_plan(7, [Row(0, [1], 3, [5, 6, 7]), Row(1, [2], 4)], 4)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Channel[ToWorker]]]:
    """A bare socket and a channel over its peer."""
    ours, theirs = socket.socketpair()
    channel: Channel[ToWorker] = Channel(theirs, ToWorker)  # type: ignore[arg-type]
    with ours:
        yield ours, channel
    channel.close()


def framed(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


@pytest.mark.parametrize("message", [PLAN, Flush(), Shutdown()])
def test_one_byte_at_a_time(ends: tuple[socket.socket, Channel[ToWorker]], message: ToWorker) -> None:
    ours, channel = ends

    def trickle() -> None:
        for byte in framed(message):
            ours.send(bytes([byte]))

    sender = threading.Thread(target=trickle)
    sender.start()
    assert channel.receive() == message
    sender.join()


def test_messages_in_one_packet_come_one_by_one(ends: tuple[socket.socket, Channel[ToWorker]]) -> None:
    ours, channel = ends
    ours.sendall(framed(PLAN) + framed(Flush()) + framed(Shutdown()))
    assert [channel.receive() for _ in range(3)] == [PLAN, Flush(), Shutdown()]


@pytest.mark.parametrize("length", [0, 2, 4, 10])
def test_end_of_file_wherever_the_frame_is_cut(
    ends: tuple[socket.socket, Channel[ToWorker]], length: int
) -> None:
    ours, channel = ends
    ours.sendall(framed(PLAN)[:length])
    ours.close()
    with pytest.raises(EOFError):
        channel.receive()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HEADER.pack(1 << 31), "2147483648 bytes"),
        (framed(["no such tag"]), "no such tag"),
        (framed({"a": 1}), "array"),
        (HEADER.pack(1) + b"\xc1", "malformed"),
    ],
)
def test_what_is_no_message_is_refused(
    ends: tuple[socket.socket, Channel[ToWorker]], data: bytes, reason: str
) -> None:
    ours, channel = ends
    ours.sendall(data)
    with pytest.raises(ProtocolError, match=reason):
        channel.receive()


def test_threads_do_not_cut_into_each_others_frames() -> None:
    ours, theirs = socket.socketpair()
    worker: Channel[ToWorker] = Channel(theirs, ToWorker)  # type: ignore[arg-type]
    front: Channel[FromWorker] = Channel(ours, FromWorker)  # type: ignore[arg-type]
    long = WorkerFailure("x" * 300_000, fatal=True)
    senders = [threading.Thread(target=lambda: [worker.send(Heartbeat(1, 0.5)) for _ in range(200)])]
    senders += [threading.Thread(target=lambda: [worker.send(long) for _ in range(20)])]
    for sender in senders:
        sender.start()
    received = [front.receive() for _ in range(220)]
    for sender in senders:
        sender.join()
    assert received.count(long) == 20
    assert received.count(Heartbeat(1, 0.5)) == 200
    worker.close()
    front.close()


def test_a_plan_survives_the_wire() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(PLAN), type=ToWorker) == PLAN
    assert isinstance(PLAN, StepPlan)
