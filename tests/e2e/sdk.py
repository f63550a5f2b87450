"""What the end-to-end tests share: clients of the official SDK, and prompts that play a text."""

from __future__ import annotations

from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI

from bench.server import ServerProcess

SLOW_RATE = 100.0
"""tokens a second"""
TEXT = 'Plain words, “quotes”, a\ttab, a newline\n, 日本語, an emoji 🙂 and \\ back"slashes".'


def played(text: str) -> str:
    """A message that makes the playback worker answer `text`."""
    return f"Say this: <<<play>>>{text}<<<end>>>"


def user(text: str) -> list[Any]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def connect(server: ServerProcess, **options: Any) -> OpenAI:
    """A client without retries, to be used in a `with`; over the Unix socket where the server has one."""
    options = {"api_key": "none", "max_retries": 0, "timeout": 60.0} | options
    if server.url.startswith("unix:"):
        transport = httpx.HTTPTransport(uds=server.url.removeprefix("unix:"))
        return OpenAI(
            base_url="http://localhost/v1", http_client=httpx.Client(transport=transport), **options
        )
    return OpenAI(base_url=f"{server.url}/v1", **options)


def connect_async(server: ServerProcess, **options: Any) -> AsyncOpenAI:
    options = {"api_key": "none", "max_retries": 0, "timeout": 60.0} | options
    return AsyncOpenAI(base_url=f"{server.url}/v1", **options)
