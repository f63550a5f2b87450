"""Forced calls in the formats whose arguments are not JSON, of a real worker through the OpenAI SDK.

CI asks a tiny model with random weights, in one format. MLXD_CALL_FORMATS=0:40 says which tries SmolLM2 is
to make in each of the formats, of as many as one likes. Every other try streams. A call that `max_tokens`
cuts is none; it is counted, and must be rare.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from bench.server import ServerProcess
from mlxd.chat.call_grammar import arguments_schema
from mlxd.chat.types import ToolSpec
from tests.e2e.test_structured import TIMEOUT, all_at_once, openai_fields
from tests.unit.chat.grammar_walk import END, Walker
from tests.unit.chat.made_schemas import TOOLS, problems
from tests.worker.model_folders import write_llama

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]

ASKED = os.environ.get("MLXD_CALL_FORMATS")
TRIES = range(*map(int, (ASKED or "0:12").split(":")))
PARSERS = ("qwen3_coder", "gemma4", "minimax", "deepseek_v4", "glm47", "nemotron")[: None if ASKED else 1]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a:"
MAX_TOKENS = 300
MAX_CUT = 0.1
"""of all calls"""


def tiny_model(folder: Path) -> Path:
    """Two layers with random weights; a token is a byte, or one of a few words."""
    tokenizer = Walker(str(folder)).tokenizer
    write_llama(folder, eos_token_id=tokenizer.token_to_id(END), max_position_embeddings=8192)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.parametrize("parser", PARSERS)
def test_forced_calls_are_valid(
    start: Callable[[dict[str, Any]], ServerProcess], parser: str, tmp_path: Path
) -> None:
    path = "demo:smollm2" if ASKED else str(tiny_model(tmp_path))
    config = {"model": {"path": path}, "cache": {"memory_mb": 256}, "chat": {"tool_call_parser": parser}}
    server = start(config)
    tools = [TOOLS[i % len(TOOLS)] for i in TRIES]

    async def ask(client: AsyncOpenAI, number: int, tool: ToolSpec) -> Any:
        fields = openai_fields(number, [tool]) | {"max_tokens": MAX_TOKENS, "parallel_tool_calls": False}
        if number % 2:
            async with client.chat.completions.stream(**fields) as stream:
                return await stream.get_final_completion()
        return await client.chat.completions.create(**fields)

    async def run() -> list[Any]:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT
        ) as client:
            return await all_at_once(ask(client, *numbered) for numbered in zip(TRIES, tools, strict=True))

    answers = asyncio.run(run())
    num_cut = 0
    for tool, answer in zip(tools, answers, strict=True):
        [choice] = answer.choices
        if choice.finish_reason == "length":
            num_cut += 1
            continue
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls
        assert call.function.name == tool.name
        assert not problems(arguments_schema(tool), call.function.arguments), call.function.arguments
    print(f"{parser}: {len(answers)} calls, {num_cut} cut")
    assert num_cut <= MAX_CUT * len(answers)
