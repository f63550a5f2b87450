"""A chat with a model that thinks, whose template leaves earlier thinking out: what its turns compute.

It does not know how that is made small: `python -m bench.prefix --thinking` runs it on a server that computes
answers ahead of the next turn and on one that does not. SmolLM2 does not think: a template that opens the
block and a budget that closes it make it do as if, and its answers have a fixed length.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import httpx

from bench.server import ServerProcess

TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""
"""as Qwen3's and DeepSeek-R1's do it"""
THINKING_TOKENS = 16
PAUSE_SECONDS = 1.0
"""for which the user reads"""
BESIDE_TOKENS = 120
"""of a stream beside which chats end"""
NUM_BESIDE = 3
LENGTHS = {"thinking_token_budget": THINKING_TOKENS, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Turn:
    """`computed_tokens` of the prompt; seconds to the first token of the thinking."""

    prompt_tokens: int
    computed_tokens: int
    ttft_seconds: float


@dataclass(frozen=True, slots=True)
class Beside:
    """Gaps between the tokens of a stream while chats beside it end, in seconds."""

    median: float
    p95: float
    max: float
    total: float


Stream = Callable[[httpx.Client, str, dict[str, Any]], Any]


def run(stream: Stream, questions: tuple[str, ...], num_turns: int, max_tokens: int) -> dict[str, Any]:
    """Both servers, one after the other. `stream` asks one and gives an Answer."""
    return {
        name: _on_server(stream, questions, num_turns, max_tokens, ahead=ahead)
        for name, ahead in (("ahead", True), ("not_ahead", False))
    }


def _on_server(
    stream: Stream, questions: tuple[str, ...], num_turns: int, max_tokens: int, *, ahead: bool
) -> dict[str, Any]:
    config = {
        "model": {"path": "demo:smollm2", "chat_template": TEMPLATE},
        "cache": {"memory_mb": 512, "prefill_answers": ahead},
    }
    with ServerProcess(config, ready_seconds=600) as server:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            turns = _chat(client, stream, questions, num_turns, max_tokens)
            beside = _beside(client, stream, max_tokens)
        status = server.wait_idle()
    later = turns[1:]
    return {
        "turns": [asdict(turn) for turn in turns],
        "computed_tokens_a_turn": statistics.mean(turn.computed_tokens for turn in later),
        "ttft_seconds": statistics.median(turn.ttft_seconds for turn in later),
        "beside": asdict(beside),
        "background_tokens": status["cache"]["background_tokens"],
        "integrity_errors": status["integrity_errors"],
    }


def _chat(
    client: httpx.Client, stream: Stream, questions: tuple[str, ...], num_turns: int, max_tokens: int
) -> list[Turn]:
    messages: list[dict[str, str]] = []
    turns: list[Turn] = []
    for number in range(num_turns):
        messages.append({"role": "user", "content": questions[number % len(questions)]})
        body = {"messages": messages, "max_tokens": max_tokens, **LENGTHS}
        answer = stream(client, "/v1/chat/completions", body)
        turns.append(Turn(answer.prompt_tokens, answer.prompt_tokens - answer.cached_tokens, answer.times[0]))
        messages.append({"role": "assistant", "content": answer.text})
        time.sleep(PAUSE_SECONDS)
    return turns


def _beside(client: httpx.Client, stream: Stream, max_tokens: int) -> Beside:
    """A completion that runs all the while, and chats of one turn, one after another."""
    body = {"prompt": "Once upon a time", "max_tokens": BESIDE_TOKENS, "ignore_eos": True}
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(stream(client, "/v1/completions", body)))
    thread.start()
    for number in range(NUM_BESIDE):
        question = {"role": "user", "content": f"What is {number} and {number}?"}
        chat = {"messages": [question], "max_tokens": max_tokens // 2, **LENGTHS}
        stream(client, "/v1/chat/completions", chat)
    thread.join()
    times = found[0].times
    gaps = sorted(later - earlier for earlier, later in pairwise(times))
    return Beside(statistics.median(gaps), gaps[int(0.95 * len(gaps))], gaps[-1], times[-1] - times[0])
