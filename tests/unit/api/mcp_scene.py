"""An app with a fake engine that makes calls, and fake MCP servers that run them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import httpx
import msgspec

from mlxd.api.app import App
from mlxd.config import McpConfig
from mlxd.engine.request import FinishReason, GenerationRequest, RequestOutput
from mlxd.mcp.hub import McpHub
from mlxd.mcp.servers_file import McpServerSpec
from tests.unit.api.fakes import TOKENIZER, FakeEngine, client, make_app, says, sse_json
from tests.unit.mcp.fakes import FakeServer, until_tried

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
LOCAL = {"type": "function", "function": {"name": "local", "parameters": {"type": "object"}}}
SUMS = {"type": "mcp", "server_label": "sums"}


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Scene:
    """An app, its fake engine, and fake MCP servers `sums` (add, sub) and `files` (read)."""

    def __init__(self, *answers: str, **config: Any) -> None:
        self.servers = {"sums": FakeServer(pages=[["add", "sub"]]), "files": FakeServer(pages=[["read"]])}
        self.config = msgspec.convert(config, McpConfig)
        self.answers = list(answers)
        self.finish = FinishReason.STOP
        self.engine = FakeEngine(self._script)

    def _script(self, request: GenerationRequest) -> Iterable[RequestOutput]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return says(answer, finish=self.finish)(request)

    def prompts(self) -> list[str]:
        return [TOKENIZER.decode(request.prompt_token_ids) for request in self.engine.submitted]

    def run(self, use: Callable[[App], Awaitable[None]]) -> None:
        async def main() -> None:
            specs = [McpServerSpec(name=name, transport="stdio", command="x") for name in self.servers]
            hub = McpHub(
                self.config, specs, lambda spec, lost: self.servers[spec.name].open_client(spec, lost)
            )
            hub.start()
            for connection in hub.connections:
                await until_tried(connection)
            try:
                await use(make_app(self.engine, mcp=hub))
            finally:
                await hub.stop()
            assert self.engine.num_running == 0

        asyncio.run(main())

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        found: list[httpx.Response] = []

        async def use(app: App) -> None:
            async with client(app) as http:
                found.append(await http.request(method, path, json=body))

        self.run(use)
        return found[0]

    def chat(self, **fields: Any) -> Any:
        response = self.ask("POST", CHAT, {"messages": USER, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, **fields: Any) -> list[Any]:
        response = self.ask("POST", CHAT, {"messages": USER, "stream": True, **fields})
        assert response.status_code == 200, response.text
        return sse_json(response.content)


def error_of(response: httpx.Response) -> tuple[int, str | None, str | None, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"], error["message"]
