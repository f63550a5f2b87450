"""Flow control over a bare transport."""

from __future__ import annotations

import asyncio

from mlxd.server.flow import FlowControl
from tests.wire.harness import FakeTransport, in_loop


def flow_control() -> tuple[FlowControl, FakeTransport]:
    transport = FakeTransport(asyncio.Protocol())
    return FlowControl(transport, write_buffer_bytes=100, now=0.0), transport


@in_loop
async def test_draining_an_open_flow_returns_at_once() -> None:
    flow, transport = flow_control()
    assert transport.high == 100
    await flow.drain()
    flow.resume_writing()
    await flow.drain()


@in_loop
async def test_all_writers_wake() -> None:
    flow, _ = flow_control()
    flow.pause_writing()
    writers = [asyncio.create_task(flow.drain()) for _ in range(3)]
    await asyncio.sleep(0)
    assert flow.write_paused and not any(writer.done() for writer in writers)
    flow.resume_writing()
    await asyncio.gather(*writers)
    assert not flow.write_paused


@in_loop
async def test_reading_pauses_and_resumes_once() -> None:
    flow, transport = flow_control()  # the transport asserts that calls alternate
    for _ in range(2):
        flow.pause_reading()
    assert not transport.reading
    for _ in range(2):
        flow.resume_reading()
    assert transport.reading


def test_a_stall_is_no_progress_for_so_long() -> None:
    flow, transport = flow_control()
    transport.stalled = True
    assert not flow.is_stalled(0.0, 10)
    flow.write(b"x" * 50)
    assert not flow.is_stalled(9.9, 10)
    assert flow.is_stalled(10.0, 10)
    transport.take(1)
    assert not flow.is_stalled(10.0, 10)
    assert not flow.is_stalled(19.0, 10)
    transport.take()
    assert not flow.is_stalled(50.0, 10), "nothing waits to be taken"
