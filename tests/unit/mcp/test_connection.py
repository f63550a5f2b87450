"""One server's connection: its tools, calls that go wrong, and coming back after a death."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mlxd.chat import tools as chat_tools
from mlxd.errors import McpError
from mlxd.mcp import connection as module
from mlxd.mcp.connection import McpConnection, State, describe
from mlxd.mcp.servers_file import McpServerSpec
from tests.unit.mcp.fakes import Block, FakeServer, Result, text, until_tried

SPEC = McpServerSpec(name="s", transport="stdio", command="x")


class ProtocolError(Exception):
    """As the package's MCPError carries what the other side said."""

    def __init__(self, message: str) -> None:
        self.error = type("E", (), {"message": message})


def play(
    server: FakeServer,
    scenario: Callable[[McpConnection, list[float]], Awaitable[None]],
    spec: McpServerSpec = SPEC,
    clock: Callable[[], float] = lambda: 0.0,
) -> None:
    async def main() -> None:
        pauses: list[float] = []

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            await asyncio.sleep(0)

        connection = McpConnection(spec, server.open_client, max_result_bytes=1000, clock=clock, sleep=sleep)
        assert connection.state is State.CONNECTING
        connection.start()
        await until_tried(connection)
        try:
            await scenario(connection, pauses)
        finally:
            await connection.stop()
            assert server.num_opened >= server.num_closed
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_tools_of_all_pages_and_a_call() -> None:
    server = FakeServer(pages=[["add", "sub"], ["mul"]])

    async def scenario(connection: McpConnection, pauses: list[float]) -> None:
        assert connection.state is State.CONNECTED and connection.error is None
        assert list(connection.tools) == ["add", "sub", "mul"]
        assert connection.tools["mul"].full_name == "s__mul"
        result = await connection.call("add", {"a": 1}, 5)
        assert (result.text, result.is_error) == ("add {'a': 1}", False)
        assert result.blocks == [{"type": "text", "text": "add {'a': 1}"}]
        assert server.calls == [("add", {"a": 1})]

    play(server, scenario)
    assert (server.num_opened, server.num_closed) == (1, 1)


def test_tools_that_no_chat_can_call_are_hidden(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer(pages=[["add", "añadir", "x" * 125, "y" * 126, "two words"]])

    async def scenario(connection: McpConnection, pauses: list[float]) -> None:
        assert list(connection.tools) == ["add", "x" * 125]  # 128 characters with the server's name
        chat_tools.read_tools(
            [{"type": "function", "function": {"name": t.full_name}} for t in connection.tools.values()]
        )
        server.on_lost()
        while server.num_listed < 2:
            await asyncio.sleep(0)
        assert caplog.text.count("is no name for a tool") == 3

    play(server, scenario)


def test_only_allowed_tools() -> None:
    spec = McpServerSpec(name="s", transport="stdio", command="x", allowed_tools=frozenset({"sub"}))

    async def scenario(connection: McpConnection, pauses: list[float]) -> None:
        assert list(connection.tools) == ["sub"]

    play(FakeServer(pages=[["add", "sub"]]), scenario, spec)


@pytest.mark.parametrize(
    ("answer", "expected", "is_error"),
    [
        (text("bad luck", is_error=True), "bad luck", True),
        (Result([]), "", False),
        (Result([], structured_content={"a": 1}), '{"a":1}', False),
        (text("x" * 2000), "the tool's result has 2", True),
        (
            Result([Block({"type": "image", "data": "…"}), Block({"type": "text", "text": "a"})]),
            "[image]\na",
            False,
        ),
        (Result([Block({"type": "resource", "resource": {"uri": "u", "text": "words"}})]), "words", False),
        (Result([Block({"type": "resource", "resource": {"uri": "u", "blob": "…"}})]), "[resource u]", False),
        (Result([Block({"type": "resource_link", "uri": "u"})]), "[resource u]", False),
    ],
)
def test_results(answer: Result, expected: str, is_error: bool) -> None:
    async def scenario(connection: McpConnection, pauses: list[float]) -> None:
        result = await connection.call("add", {}, 5)
        assert result.text.startswith(expected) and result.is_error is is_error

    play(FakeServer(answer=lambda name, arguments: answer), scenario)


def test_a_call_that_is_refused_or_late() -> None:
    answers: list[Any] = [ProtocolError("no such tool"), ValueError("/secret/path")]

    async def scenario(connection: McpConnection, pauses: list[float]) -> None:
        with pytest.raises(McpError, match="tool 'add' failed: no such tool"):
            await connection.call("add", {}, 5)
        with pytest.raises(McpError, match=r"tool .add. failed: ValueError$"):
            await connection.call("add", {}, 5)
        answers.append(asyncio.get_running_loop().create_future())
        with pytest.raises(McpError, match=r"took longer than 0\.01 seconds"):
            await connection.call("add", {}, 0.01)
        assert connection.state is State.CONNECTED

    play(FakeServer(answer=lambda name, arguments: answers.pop(0)), scenario)


def test_a_server_that_dies_is_started_again() -> None:
    pending: list[asyncio.Future[Any]] = []

    def answer(name: str, arguments: dict[str, Any]) -> Any:
        pending.append(asyncio.get_running_loop().create_future())
        return pending[-1]

    server = FakeServer(answer=answer)

    async def scenario(connection: McpConnection, pauses: list[float]) -> None:
        call = asyncio.create_task(connection.call("add", {}, 5))
        while not pending:
            await asyncio.sleep(0)
        server.on_lost()
        pending[0].set_exception(ProtocolError("Connection closed"))
        with pytest.raises(McpError, match="MCP server 's' died during the call"):
            await call
        while server.num_opened < 2 or connection.state is not State.CONNECTED:
            await asyncio.sleep(0)
        assert connection.num_restarts == 1 and list(connection.tools) == ["add"]
        assert pauses == [module.FIRST_PAUSE_SECONDS]

    play(server, scenario)
    assert server.num_closed == 2


def test_pauses_grow_until_a_connection_has_lasted() -> None:
    server = FakeServer(
        opens=[OSError(5, "x"), ExceptionGroup("", [FileNotFoundError()]), *[OSError()] * 8, None]
    )
    time = [0.0]

    async def scenario(connection: McpConnection, pauses: list[float]) -> None:
        assert connection.state is State.DISCONNECTED and connection.error == "x"
        with pytest.raises(McpError, match="MCP server 's' is disconnected: x"):
            await connection.call("add", {}, 5)
        while connection.state is not State.CONNECTED:
            await asyncio.sleep(0)
        assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]
        server.on_lost()
        while len(pauses) < 11 or connection.state is not State.CONNECTED:
            await asyncio.sleep(0)
        assert pauses[-1] == module.LONGEST_PAUSE_SECONDS  # it did not last
        time[0] += module.STABLE_SECONDS + 1
        server.on_lost()
        while len(pauses) < 12:
            await asyncio.sleep(0)
        assert pauses[-1] == module.FIRST_PAUSE_SECONDS

    play(server, scenario, clock=lambda: time[0])


def test_tools_are_listed_anew_and_silence_is_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(module, "REFRESH_TIMEOUT_SECONDS", 0.05)
    server = FakeServer()

    async def scenario(connection: McpConnection, pauses: list[float]) -> None:
        server.pages = [["other"]]
        while list(connection.tools) != ["other"]:
            await asyncio.sleep(0)

        async def silent(*, cursor: str | None) -> Any:
            await asyncio.get_running_loop().create_future()

        server.list_tools = silent  # type: ignore[method-assign,assignment]
        while connection.state is not State.DISCONNECTED and not pauses:
            await asyncio.sleep(0.001)
        assert connection.error == "it did not answer in time"
        assert connection.tools == {}

    play(server, scenario)


def test_descriptions_hold_no_addresses() -> None:
    assert describe(ConnectionRefusedError(111, "Connection refused")) == "Connection refused"
    assert describe(RuntimeError("https://h/?token=1")) == "RuntimeError"
    refused = RuntimeError("https://h/?token=1")
    refused.response = type("R", (), {"status_code": 401})  # type: ignore[attr-defined]
    assert describe(ExceptionGroup("", [refused])) == "it answered with HTTP status 401"
