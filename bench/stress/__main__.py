"""`python -m bench.stress`: storms of conversations over HTTP on the real worker, with a pool for a few.

It does not know how requests are made (asks) or sent (storm). Each greedy answer is compared with the same
request's on a server without prefix cache that has room for all. Exit code 1 when an answer differs without a
tie, has no end or two, ends with an error that nobody asked for, or when anything is left over.

`python -m bench.stress [--conversations 2000] [--weather tiny,disk,wide,thinking,kills,recurrent]`
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import report
from bench.server import ServerProcess
from bench.stress.storm import MAX_TIES, Storm, compare

BLOCK_SIZE = 8
MAX_MODEL_LEN = 400
COMPARED_AT_ONCE = 16
THINKING_TEMPLATE = "thinking.jinja"


@dataclass(frozen=True, slots=True)
class Weather:
    """What a round is like. `clients` talk at once, `sequences` run at once in `blocks` of BLOCK_SIZE tokens,
    `batched_tokens` a step; most answers are shorter than `max_tokens`; `kills`: how often the worker is
    killed; `states_mb`: for a model with recurrent state, four times what is there to keep states."""

    blocks: int = 52
    sequences: int = 10
    batched_tokens: int = 48
    clients: int = 16
    max_tokens: int = 40
    disk: bool = False
    thinks: bool = False
    kills: int = 0
    states_mb: int = 0


WEATHERS = {
    "tiny": Weather(),
    "disk": Weather(disk=True),
    "wide": Weather(blocks=260, sequences=40, batched_tokens=512, clients=64, max_tokens=160),
    "thinking": Weather(thinks=True),
    "kills": Weather(disk=True, thinks=True, kills=4),
    "recurrent": Weather(thinks=True, kills=2, states_mb=1),
}


def write_model(folder: Path, shape: str) -> str:
    """Its folder, a part of `folder`. In a process of its own: this one need not know MLX."""
    path = folder / shape
    if not path.exists():
        command = [sys.executable, "-m", "bench.stress.model", str(path), shape]
        subprocess.run(command, check=True, cwd=report.ROOT)
    return str(path)


def server_config(model: str, weather: Weather, cache: dict[str, Any]) -> dict[str, Any]:
    """What the two servers of a round have in common, and `cache`."""
    template = {"chat_template": f"{model}/{THINKING_TEMPLATE}"} if weather.thinks else {}
    return {
        "model": {"path": model, "max_model_len": MAX_MODEL_LEN, **template},
        "chat": {"tool_call_parser": "hermes", "reasoning_parser": "qwen3" if weather.thinks else "none"},
        "cache": {"block_size": BLOCK_SIZE, **cache},
        "server": {"access_log": False},
        "worker": {"warmup": False, "threads": 1},
        "log": {"level": "warning"},
    }


def run_round(
    folder: Path, model: str, weather: Weather, *, num_conversations: int, seed: int
) -> dict[str, Any]:
    """One storm on a server of its own, and the comparison; `problems` says what was wrong."""
    cache: dict[str, Any] = {"num_blocks": weather.blocks}
    if weather.states_mb:
        cache |= {"memory_mb": weather.states_mb}
    if weather.disk:
        cache |= {"disk_path": str(folder / "disk"), "disk_max_gb": 0.01}
    small = server_config(model, weather, cache)
    small["scheduler"] = {
        "max_num_seqs": weather.sequences,
        "max_num_batched_tokens": weather.batched_tokens,
        "max_queue": weather.clients,
    }
    plain = server_config(model, weather, {"num_blocks": 4096, "prefix_caching": False})
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        server = stack.enter_context(ServerProcess(small, ready_seconds=600))
        # Starts while the storm is on, and then only waits.
        other = pool.submit(stack.enter_context, ServerProcess(plain, ready_seconds=600))
        storm = Storm(
            server.url, seed=seed, max_tokens=weather.max_tokens, thinks=weather.thinks, kills=weather.kills
        )
        started = time.perf_counter()
        asyncio.run(storm.run(num_conversations, weather.clients))
        seconds = time.perf_counter() - started
        status = server.wait_idle()
        said = [line for line in server.output.splitlines() if " ERROR " in line or "Traceback" in line]
        num_ties, differences = asyncio.run(compare(other.result().url, storm.greedy, COMPARED_AT_ONCE))
    kills, finished = storm.client.counts["kill"], status["finish_reasons"]
    left = {
        "blocks in use": status["cache"]["used_blocks"],
        "failed integrity checks": status["integrity_errors"],
        "worker restarts that nobody caused": status["worker"]["restarts"] - kills,
        "failed sequences": 0 if kills else finished.get("error", 0),
    }
    problems = storm.client.violations + differences
    problems += [f"{count} {what}" for what, count in left.items() if count]
    problems += [f"the server said: {line}" for line in said if not kills]
    if num_ties > max(2, len(storm.greedy) * MAX_TIES):
        problems.append(f"{num_ties} ties among {len(storm.greedy)} answers")
    return {
        "weather": weather,
        "seconds": seconds,
        "counts": dict(sorted(storm.client.counts.items())),
        "compared": len(storm.greedy),
        "ties": num_ties,
        "prompt_tokens": storm.prompt_tokens,
        "cached_tokens": storm.cached_tokens,
        "preempted": status["num_preempted"],
        "evicted_blocks": status["cache"]["evicted_blocks"],
        "hit_types": status["cache"]["hit_types"],
        "disk": status["cache"].get("disk"),
        "snapshots": status["cache"].get("max_snapshots"),
        "finish_reasons": finished,
        "problems": problems,
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every answer was right and nothing is left, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.stress", description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=2000, help="in all rounds together")
    parser.add_argument("--weather", default=",".join(WEATHERS), help="a round for each name")
    parser.add_argument("--model", help="a real one; without it a tiny one with random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    names = args.weather.split(",")
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="stress-") as name:
        for number, kind in enumerate(names):
            shape = "tiny-recurrent" if WEATHERS[kind].states_mb else "tiny"
            figures = run_round(
                Path(name),
                args.model or write_model(Path(name), shape),
                WEATHERS[kind],
                num_conversations=args.conversations // len(names),
                seed=args.seed + number,
            )
            rounds.append(figures)
            console.print(f"{kind}: {figures | {'problems': len(figures['problems'])}}")
            for problem in figures["problems"][:20]:
                console.print(problem)
    num_problems = sum(len(figures["problems"]) for figures in rounds)
    console.print(f"{args.conversations} conversations, {num_problems} problems")
    if args.out is not None:
        flags = {key: value for key, value in vars(args).items() if key != "out"}
        head = report.provenance("stress", flags=flags, seed=args.seed)
        report.write(args.out, head | {"rounds": rounds})
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
