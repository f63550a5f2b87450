"""Chats between two answers: while tools run, or a worker is on its way, clients hear that they live."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mlxd.api import event_stream
from mlxd.api.app import App
from mlxd.api.generation import Generation, cancelled
from tests.unit.api.fakes import Wire, sse_json, until
from tests.unit.api.mcp_scene import CHAT, SUMS, USER, Scene, called
from tests.unit.mcp.fakes import text

BODY = json.dumps({"messages": USER, "tools": [SUMS], "stream": True}).encode()
PING = b": ping\n\n"


@pytest.fixture(autouse=True)
def _frequent_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxd.api.openai.frames._Frames.ping_seconds", 0.001)


class SlowTool(Scene):
    """The tool's answer is the test's to give."""

    def __init__(self) -> None:
        super().__init__(called("sums__add"), "Done.")
        self.unhandled: list[dict[str, Any]] = []
        """what asyncio would log"""
        self.servers["sums"].answer = self._answer
        self.result: asyncio.Future[Any] | None = None

    def _answer(self, name: str, arguments: Any) -> Any:
        self.result = asyncio.get_running_loop().create_future()
        return self.result

    def finish_tool(self) -> None:
        assert self.result is not None
        self.result.set_result(text("3"))

    def play(self, use: Callable[[Wire], Awaitable[None]], body: bytes = BODY) -> None:
        async def main(app: App) -> None:
            asyncio.get_running_loop().set_exception_handler(
                lambda loop, context: self.unhandled.append(context)
            )
            wire = Wire(app, "POST", CHAT, body)
            await until(lambda: self.result is not None)
            await use(wire)
            await wire.task

        self.run(main)


def test_a_client_hears_of_its_stream_while_a_tool_runs_and_while_a_worker_starts() -> None:
    scene = SlowTool()

    async def use(wire: Wire) -> None:
        await until(lambda: wire.body.count(PING) >= 3)
        scene.engine.restarting = True
        scene.finish_tool()
        await until(lambda: "until_ready" in scene.engine.calls)
        so_far = wire.body.count(PING)
        await until(lambda: wire.body.count(PING) >= so_far + 3)
        scene.engine.restarting = False
        await wire.task
        frames = [frame + b"\n\n" for frame in wire.body.split(b"\n\n")[:-1]]
        chunks = sse_json(b"".join(frame for frame in frames if frame != PING))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert list(deltas[0]) == ["role", "content"] and list(deltas[1]) == ["mcp_calls"]
        assert "".join(delta.get("content", "") for delta in deltas) == "Done."
        assert frames[-1] == b"data: [DONE]\n\n" and frames.count(frames[-1]) == 1

    scene.play(use)


def test_a_client_that_is_found_gone_by_a_ping_ends_the_tool() -> None:
    scene = SlowTool()

    async def use(wire: Wire) -> None:
        wire.broken = True
        await wire.task
        assert scene.result is not None and scene.result.cancelled()

    scene.play(use)
    assert len(scene.engine.submitted) == 1


def test_an_answer_that_begins_while_a_ping_waits_for_a_client_that_leaves_is_ended() -> None:
    scene = SlowTool()

    async def use(wire: Wire) -> None:
        wire.stall = asyncio.get_running_loop().create_future()
        await until(lambda: wire.is_stalled)
        scene.engine.held = True
        scene.finish_tool()
        await until(lambda: scene.engine.num_running == 1)
        wire.broken = True
        wire.stall.set_result(None)
        await wire.task
        assert scene.engine.num_running == 0 and len(scene.engine.cancelled) == 1

    scene.play(use)


def test_a_tool_that_fails_while_a_ping_waits_for_a_client_that_leaves_is_no_bug() -> None:
    scene = SlowTool()

    async def use(wire: Wire) -> None:
        wire.stall = asyncio.get_running_loop().create_future()
        await until(lambda: wire.is_stalled and scene.result is not None and scene.result.cancelled())
        for _ in range(20):  # until the failure has reached whoever asked for the tool
            await asyncio.sleep(0)
        wire.broken = True
        wire.stall.set_result(None)
        await wire.task

    fields = {"messages": USER, "tools": [SUMS], "stream": True, "timeout": 0.2}
    scene.play(use, json.dumps(fields).encode())
    gc.collect()
    assert scene.unhandled == []


def test_a_chat_that_is_cancelled_as_its_answer_ends_runs_no_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is over, and what comes after it has not begun."""
    scene = SlowTool()
    follow = event_stream._follow

    async def cancelled_first(request: Any, generation: Generation, *more: Any) -> Any:
        generation.end(cancelled())
        return await follow(request, generation, *more)

    monkeypatch.setattr(event_stream, "_follow", cancelled_first)

    async def main(app: App) -> None:
        wire = Wire(app, "POST", CHAT, BODY)
        await asyncio.wait_for(wire.task, 5)
        assert b"request_cancelled" in wire.body and scene.result is None

    scene.run(main)
