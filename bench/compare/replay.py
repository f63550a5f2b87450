"""`python -m bench.compare.replay`: an agent's session (bench.replay) against mlxd, then against vllm-mlx.

It does not know what a server computes: mlxd's `usage` says it; vllm-mlx's `usage` has no cached tokens, but
its log has how many tokens of each prompt it computes. Run twice there: with its prefix cache as it is by
default, and with its paged one. The last prompt is sent once more, and what each server reports of its cache
at the end is written down too.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from bench import report
from bench.compare.contenders import CONTENDERS, Contender
from bench.compare.process import ServerUnderTest, blas_environment, free_port
from bench.replay import Agent, summarise
from bench.replay import replay as play

READY_SECONDS = 300.0
TIMEOUT_SECONDS = 600.0
PREFILLED = re.compile(r"\[schedule\] .*\btokens_to_prefill=(\d+)")


def _default_cache(model: Path, port: int, max_clients: int) -> Sequence[str]:
    return [
        *("serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--continuous-batching", "--enable-prefix-cache", "--cache-memory-mb", "2048"),
    ]


VLLM_MLX = CONTENDERS["vllm-mlx"]
SERVERS = (
    CONTENDERS["mlxd"],
    replace(VLLM_MLX, arguments=_default_cache),
    replace(VLLM_MLX, name="vllm-mlx, paged cache"),
)


def run(server: Contender, python: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A session; `computed_by` says how it is known what was computed."""
    port = free_port()
    command = server.command(python, args.model, port, 1)
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        log = Path(folder) / "log"
        # A home of its own: vllm-mlx keeps its cache there from one run to the next.
        env = blas_environment() | {"HOME": folder}
        with ServerUnderTest(command, port, env, log) as process:
            process.wait_healthy(server.health_path, READY_SECONDS)
            name = str(args.model) if server.needs_model_name else "default"
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_SECONDS) as http:
                agent = Agent(http, name, seed=0, max_tokens=args.max_tokens)
                turns = play(
                    agent,
                    num_turns=args.turns,
                    system_tokens=args.system_tokens,
                    final_tokens=args.final_tokens,
                )
                again = agent.again()
                stats = http.get("/v1/cache/stats").json()
            prefilled = [int(count) for count in PREFILLED.findall(log.read_text(errors="replace"))]
    if prefilled:
        # The first ones are those of the calibration.
        asked = [*turns, again]
        for turn, count in zip(asked, prefilled[-len(asked) :], strict=True):
            turn["cached_tokens"] = turn["prompt_tokens"] - count
    return {
        **summarise(turns),
        "computed_by": "its log" if prefilled else "usage",
        "command": command[2:],
        "versions": server.version(python),
        "cache_stats": stats,
        "last_prompt_again": again,
        "turns": turns,
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code 0. Raises what a server that does not answer raises."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.replay", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder that all of them can load")
    parser.add_argument("--vllm-mlx", type=Path, metavar="VENV", help="where it is installed")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--system-tokens", type=int, default=3000)
    parser.add_argument("--final-tokens", type=int, default=8000)
    parser.add_argument("--max-tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    results: dict[str, Any] = {}
    for server in SERVERS if args.vllm_mlx else SERVERS[:1]:
        own = server is SERVERS[0]
        results[server.name] = found = run(
            server, Path(sys.executable) if own else args.vllm_mlx.resolve() / "bin" / "python", args
        )
        again = found["last_prompt_again"]
        console.print(
            f"{server.name}: {found['computed_tokens']:,} of {found['prompt_tokens']:,} prompt tokens were "
            f"computed ({found['computed_share']:.1%}, by {found['computed_by']}); of the last "
            f"prompt, sent again, {again['prompt_tokens'] - again['cached_tokens']:,}"
        )
    if args.out is not None:
        flags = {key: str(value) for key, value in vars(args).items() if key not in ("out", "vllm_mlx")}
        report.write(args.out, report.provenance("compare.replay", flags=flags, seed=0) | {"result": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
