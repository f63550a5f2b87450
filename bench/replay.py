"""An agent's session, replayed: a long system prompt with tools, a history that grows turn by turn.

    python -m bench.replay --url http://127.0.0.1:8000 [--turns 30 --system-tokens 3000 --final-tokens 8000]

It does not know the server: what was computed is `prompt_tokens - cached_tokens` of each answer's `usage`.
Without a cache every prompt token of every turn is computed, so the share that this prints would be 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.table import Table

from bench import report
from bench.compare.workloads import TOOLS
from bench.serve.workload import WORDS, Calibration

CALIBRATION_WORDS = (16, 144)


class Agent:
    """One session against one server. Raises httpx.HTTPError for what is no answer."""

    def __init__(self, http: httpx.Client, model: str, *, seed: int, max_tokens: int) -> None:
        self._http = http
        self._model = model
        self._rng = random.Random(seed)
        self._max_tokens = max_tokens
        self.messages: list[dict[str, Any]] = []

    def calibrate(self) -> Calibration:
        """How many tokens a word is, and what template and tools cost, by two requests."""
        points = []
        for count in CALIBRATION_WORDS:
            _, usage, _ = self._ask([{"role": "user", "content": " ".join(["time"] * count)}])
            points.append((count, usage["prompt_tokens"]))
        return Calibration.fit(points[0], points[1])

    def begin(self, num_words: int) -> None:
        self.messages = [{"role": "system", "content": self._words(num_words)}]

    def turn(self, num_words: int) -> dict[str, Any]:
        """One question or tool's result of so many words, and the model's answer, which joins the history."""
        self.messages.append({"role": "user", "content": self._words(num_words)})
        text, figures = self._measure(self.messages)
        self.messages.append({"role": "assistant", "content": text})
        return figures

    def again(self) -> dict[str, Any]:
        """The last question once more; its answer joins nothing."""
        return self._measure(self.messages[:-1])[1]

    def _measure(self, messages: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        text, usage, ttft = self._ask(messages)
        details = usage.get("prompt_tokens_details") or {}
        return text, {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": details.get("cached_tokens") or 0,
            "output_tokens": usage["completion_tokens"],
            "ttft_seconds": ttft,
        }

    def _ask(self, messages: list[dict[str, Any]]) -> tuple[str, dict[str, Any], float]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "tools": TOOLS,
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text: list[str] = []
        usage: dict[str, Any] = {}
        started, first = time.perf_counter(), 0.0
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise httpx.HTTPError(f"{response.status_code}: {response.text[:500]}")
            for line in response.iter_lines():
                payload = line.removeprefix("data:").strip()
                if not line.startswith("data:") or payload == "[DONE]":
                    continue
                chunk = orjson.loads(payload)
                if chunk.get("error"):
                    raise httpx.HTTPError(str(chunk["error"])[:500])
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    piece = choice["delta"].get("content")
                    if piece:
                        first = first or time.perf_counter()
                        text.append(piece)
        return "".join(text), usage, (first or time.perf_counter()) - started

    def _words(self, count: int) -> str:
        return " ".join(self._rng.choices(WORDS, k=max(1, count)))


def replay(agent: Agent, *, num_turns: int, system_tokens: int, final_tokens: int) -> list[dict[str, Any]]:
    """All turns. `system_tokens` count tools and template too; what a turn adds is chosen so that the last
    prompt comes to about `final_tokens`."""
    calibration = agent.calibrate()
    agent.begin(calibration.words(system_tokens))
    turns: list[dict[str, Any]] = []
    size = float(system_tokens)
    for index in range(num_turns):
        left = (final_tokens - size) / (num_turns - index)
        spent = turns[-1]["output_tokens"] if turns else 0
        turns.append(agent.turn(round((left - spent) / calibration.tokens_per_word)))
        size = turns[-1]["prompt_tokens"]
    return turns


def summarise(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals, and the least that had to be computed: each token of the last prompt and the answers once."""
    sent = sum(turn["prompt_tokens"] for turn in turns)
    computed = sent - sum(turn["cached_tokens"] for turn in turns)
    generated = sum(turn["output_tokens"] for turn in turns[:-1])
    return {
        "turns": len(turns),
        "prompt_tokens": sent,
        "computed_tokens": computed,
        "computed_share": computed / sent,
        "least_tokens": turns[-1]["prompt_tokens"] - generated,
        "last_prompt_tokens": turns[-1]["prompt_tokens"],
        "ttft_seconds": {"first": turns[0]["ttft_seconds"], "last": turns[-1]["ttft_seconds"]},
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 when the server did not answer as it should."""
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--api-key")
    add("--model", default="default")
    add("--turns", type=int, default=30)
    add("--system-tokens", type=int, default=3000)
    add("--final-tokens", type=int, default=8000)
    add("--max-tokens", type=int, default=24, help="of each answer")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=600.0, metavar="SECONDS")
    add("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(argv)
    console = Console()
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    with httpx.Client(base_url=args.url, headers=headers, timeout=args.timeout) as http:
        agent = Agent(http, args.model, seed=args.seed, max_tokens=args.max_tokens)
        try:
            turns = replay(
                agent,
                num_turns=args.turns,
                system_tokens=args.system_tokens,
                final_tokens=args.final_tokens,
            )
        except httpx.HTTPError as error:
            console.print(f"[red]{type(error).__name__}: {error}[/]", highlight=False)
            return 1
    summary = summarise(turns)
    table = Table("turn", "prompt tokens", "cached", "computed", "ttft, s")
    for number, turn in enumerate(turns, 1):
        computed = turn["prompt_tokens"] - turn["cached_tokens"]
        row = (number, turn["prompt_tokens"], turn["cached_tokens"], computed, f"{turn['ttft_seconds']:.2f}")
        table.add_row(*map(str, row))
    console.print(table)
    console.print(
        f"{summary['computed_tokens']:,} of {summary['prompt_tokens']:,} prompt tokens were computed "
        f"({summary['computed_share']:.1%}); the least possible is {summary['least_tokens']:,}"
    )
    if args.out is not None:
        flags = {name: str(value) for name, value in vars(args).items() if name not in ("api_key", "out")}
        head = report.provenance("replay", flags=flags, seed=args.seed)
        report.write(args.out, head | {"result": summary, "turns": turns})
    return 0


if __name__ == "__main__":
    sys.exit(main())
