"""A chat with a model of recurrent state: what its turns compute, and what it costs to keep states for that.

It does not know which states are kept: `python -m bench.prefix --recurrent FOLDER` runs it on a server that
keeps some (`cache.snapshot_percent`) and on one that keeps none, a small Qwen3.5 with random weights. Such a
model says words that are tokenised otherwise when they come back: of an answer the next turn reuses nothing.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.over_http import write_model
from bench.server import ServerProcess

SHAPE = "Qwen3.5-small"
SYSTEM_WORDS, QUESTION_WORDS = 600, 60
MAX_TOKENS = 24
NUM_OTHERS = 4
"""conversations under the same system prompt, one after another"""
NUM_STREAMS, STREAM_TOKENS, PROMPT_TOKENS = 16, 256, 32
"""of streams that run at once"""


@dataclass(frozen=True, slots=True)
class Turn:
    prompt_tokens: int
    cached_tokens: int
    ttft_seconds: float
    text: str


WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "with", "they", "one")

Stream = Callable[[httpx.Client, str, dict[str, Any]], Any]


def run(stream: Stream, tokenizer: Path, num_turns: int) -> dict[str, Any]:
    """Both servers, one after the other. `stream` asks one and gives an Answer."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, Namespace(shape=SHAPE, dtype="float32", tokenizer=tokenizer))
        found = {
            name: _on_server(stream, folder, num_turns, percent)
            for name, percent in (("kept", 0.25), ("not_kept", 0.0))
        }
    texts = [side.pop("texts") for side in found.values()]
    return found | {"same_texts": texts[0] == texts[1]}


def _on_server(stream: Stream, folder: Path, num_turns: int, percent: float) -> dict[str, Any]:
    config = {
        "model": {"path": str(folder)},
        "cache": {"memory_mb": 512, "snapshot_percent": percent},
        "scheduler": {"max_num_seqs": NUM_STREAMS},
    }
    rng = random.Random(7)
    with ServerProcess(config, ready_seconds=600) as server:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            system = {"role": "system", "content": _words(rng, SYSTEM_WORDS)}
            turns = _chat(client, stream, rng, [system], num_turns)
            others = [turn for _ in range(NUM_OTHERS) for turn in _chat(client, stream, rng, [system], 1)]
            rate = _streams(client, stream, rng)
        status = server.wait_idle()
    later = turns[1:]
    return {
        "turns": [asdict(turn) for turn in turns],
        "other_conversations": [asdict(turn) for turn in others],
        "computed_tokens_a_turn": statistics.mean(turn.prompt_tokens - turn.cached_tokens for turn in later),
        "ttft_seconds": statistics.median(turn.ttft_seconds for turn in later),
        "streams_tokens_per_second": rate,
        "cache": {name: value for name, value in status["cache"].items() if "snapshot" in name},
        "capacity_mb": status["cache"]["capacity_mb"],
        "peak_memory_gb": status["metal"]["peak_memory_gb"],
        "integrity_errors": status["integrity_errors"],
        "texts": [turn.text for turn in turns + others],
    }


def _chat(
    client: httpx.Client, stream: Stream, rng: random.Random, messages: list[dict[str, str]], num_turns: int
) -> list[Turn]:
    messages, turns = [*messages], []
    for _ in range(num_turns):
        messages.append({"role": "user", "content": _words(rng, QUESTION_WORDS)})
        answer = stream(client, "/v1/chat/completions", {"messages": messages, "max_tokens": MAX_TOKENS})
        turns.append(Turn(answer.prompt_tokens, answer.cached_tokens, answer.times[0], answer.text))
        messages.append({"role": "assistant", "content": answer.text})
    return turns


def _streams(client: httpx.Client, stream: Stream, rng: random.Random) -> float:
    """Tokens a second of streams that begin together and copy states as they go."""
    bodies = [
        {"prompt": rng.choices(range(1000, 40000), k=PROMPT_TOKENS), "max_tokens": STREAM_TOKENS}
        for _ in range(NUM_STREAMS)
    ]
    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        answers = list(pool.map(lambda body: stream(client, "/v1/completions", body), bodies))
    seconds: float = time.perf_counter() - start
    return sum(answer.completion_tokens for answer in answers) / seconds


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))
