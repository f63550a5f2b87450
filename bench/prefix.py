"""What the prefix cache is worth to SmolLM2 over HTTP: first tokens, tokens reused, prompts that share.

It does not know how blocks are matched: it counts what `usage` says and when tokens come. In one run: a long
prompt twice, and once more with a token changed in the middle of a block; ten requests at once that share a
long prefix; a chat of several turns. With `--thinking`, instead, a chat with a model that thinks; with
`--recurrent`, one with a model of recurrent state.

`python -m bench.prefix [--prompt-tokens 4000] [--turns 6] [--thinking] [--recurrent FOLDER] [--result FILE]`
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console

from bench import recurrent, report, thinking
from bench.server import ServerProcess

SEED = 3
BLOCK_SIZE = 16
OUTPUT_TOKENS = 8
NUM_TOGETHER = 10
OWN_TOKENS = 20
"""of each of those, behind the shared prefix"""
QUESTIONS = (
    "What is the capital of France?",
    "And of Italy? Answer in one sentence.",
    "Which of the two is older?",
    "Write two sentences about the food there.",
    "Say that again in simpler words.",
    "Thank you. What did I ask first?",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds to each token, and `usage`."""

    text: str
    times: list[float]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """Seconds to the first token of a prompt, again the same, and one decode step there (median)."""

    prompt_tokens: int
    first_seconds: float
    again_seconds: float
    decode_seconds: float
    parted_at: int
    parted_cached_tokens: int

    @property
    def ratio(self) -> float:
        return self.first_seconds / self.again_seconds

    @property
    def steps_over(self) -> float:
        """Decode steps beyond the one that there must be."""
        return self.again_seconds / self.decode_seconds - 1


@dataclass(frozen=True, slots=True)
class Together:
    """Requests at once with one prefix: prompt tokens that were computed, and the fewest possible.

    Whole blocks are shared while the prefix is being computed: a few tokens at its end are computed again
    where that is faster than to wait.
    """

    num_requests: int
    prefix_tokens: int
    computed_tokens: int
    least_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a chat. `known_tokens` are those of the turn before, its answer's end of turn included."""

    prompt_tokens: int
    cached_tokens: int
    known_tokens: int


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> Answer:
    fields = {"model": "default", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    text, times, usage = "", [], {}
    start = time.perf_counter()
    with client.stream("POST", path, json=fields | body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = orjson.loads(line[6:])
            for choice in chunk["choices"]:
                delta = choice["text"] if "text" in choice else choice["delta"].get("content")
                if delta or "text" in choice:
                    text += delta
                    times.append(time.perf_counter() - start)
                elif choice["delta"].get("reasoning"):
                    times.append(time.perf_counter() - start)
            usage = chunk.get("usage") or usage
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Answer(text, times, usage["prompt_tokens"], cached, usage["completion_tokens"])


def complete(client: httpx.Client, prompt: list[int], max_tokens: int = OUTPUT_TOKENS) -> Answer:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    return stream(client, "/v1/completions", body)


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000, 40000) for _ in range(count)]


def long_prompt(client: httpx.Client, rng: random.Random, num_tokens: int) -> LongPrompt:
    prompt = random_tokens(rng, num_tokens)
    first, again = complete(client, prompt), complete(client, prompt)
    assert again.cached_tokens == num_tokens - 1
    gaps = [b - a for a, b in zip(again.times, again.times[1:], strict=False)]
    # The last block but one, so that little is left to compute; in the middle of it.
    parted_at = (num_tokens // BLOCK_SIZE - 1) * BLOCK_SIZE + BLOCK_SIZE // 2
    parted = [*prompt[:parted_at], prompt[parted_at] + 1, *prompt[parted_at + 1 :]]
    cached = complete(client, parted, 1).cached_tokens
    decode = statistics.median(gaps)
    return LongPrompt(num_tokens, first.times[0], again.times[0], decode, parted_at, cached)


def together(client: httpx.Client, rng: random.Random, num_tokens: int) -> Together:
    prefix = random_tokens(rng, num_tokens)
    prompts = [prefix + random_tokens(rng, OWN_TOKENS) for _ in range(NUM_TOGETHER)]
    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_TOGETHER) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    seconds = time.perf_counter() - start
    computed = sum(answer.prompt_tokens - answer.cached_tokens for answer in answers)
    return Together(NUM_TOGETHER, num_tokens, computed, num_tokens + NUM_TOGETHER * OWN_TOKENS, seconds)


def chat(client: httpx.Client, num_turns: int) -> list[Turn]:
    messages: list[dict[str, str]] = []
    turns: list[Turn] = []
    known = 0
    for number in range(num_turns):
        messages.append({"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]})
        answer = stream(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 60})
        turns.append(Turn(answer.prompt_tokens, answer.cached_tokens, known))
        known = answer.prompt_tokens + answer.completion_tokens
        messages.append({"role": "assistant", "content": answer.text})
    return turns


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prefix", description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=len(QUESTIONS), choices=range(2, 31))
    parser.add_argument("--thinking", action="store_true", help="a chat with a model that thinks")
    parser.add_argument("--max-tokens", type=int, default=72, help="of its answers, thinking included")
    parser.add_argument(
        "--recurrent", type=Path, help="a chat with recurrent state; the folder of a model with a tokenizer"
    )
    parser.add_argument("--result", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    if args.thinking:
        found = thinking.run(stream, QUESTIONS, args.turns, args.max_tokens)
        flags = {"thinking": True, "turns": args.turns, "max_tokens": args.max_tokens}
        result = report.provenance("prefix", flags=flags, seed=SEED) | found
        return _finish(
            result, args.result, right=not any(side["integrity_errors"] for side in found.values())
        )
    if args.recurrent is not None:
        found = recurrent.run(stream, args.recurrent, args.turns)
        flags = {"recurrent": str(args.recurrent), "turns": args.turns}
        sides = [found["kept"], found["not_kept"]]
        right = found["same_texts"] and not any(side["integrity_errors"] for side in sides)
        return _finish(report.provenance("prefix", flags=flags, seed=SEED) | found, args.result, right=right)
    rng = random.Random(SEED)
    config = {"model": {"path": "demo:smollm2"}, "cache": {"memory_mb": 1024, "block_size": BLOCK_SIZE}}
    with ServerProcess(config, ready_seconds=600) as server:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            complete(client, random_tokens(rng, 8))
            turns = chat(client, args.turns)
            shared = together(client, rng, args.prompt_tokens // 8)
            long = long_prompt(client, rng, args.prompt_tokens)
        status = server.wait_idle()
    reused = sum(turn.cached_tokens for turn in turns[1:]) / sum(turn.known_tokens for turn in turns[1:])
    flags = {"prompt_tokens": args.prompt_tokens, "turns": args.turns}
    result = report.provenance("prefix", flags=flags, seed=SEED) | {
        "long_prompt": asdict(long) | {"ratio": long.ratio, "steps_over": long.steps_over},
        "together": asdict(shared),
        "turns": [asdict(turn) for turn in turns],
        "reused_of_known": reused,
        "integrity_errors": status["integrity_errors"],
    }
    right = long.parted_cached_tokens == long.parted_at and not status["integrity_errors"]
    right = right and shared.computed_tokens < shared.least_tokens + NUM_TOGETHER * BLOCK_SIZE
    return _finish(result, args.result, right=right)


def _finish(result: dict[str, Any], path: Path | None, *, right: bool) -> int:
    Console().print_json(orjson.dumps(result).decode())
    if path is not None:
        report.write(path, result)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
