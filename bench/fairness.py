"""Two API keys that both want more than there is: how many tokens each is given.

It does not know how the server shares: it counts what `usage` says. Playback has no limit of its own but
`scheduler.max_num_seqs` sequences at a pace, so the keys compete for those. One key asks with many
connections for long answers, the other with few for short ones. Counted is what both are given between the
moment when both queues have filled and the end, by /metrics. The prefix cache is off: what it saves costs
nobody's share, but /metrics counts it.

`python -m bench.fairness [--weights 1:1] [--seconds 15]`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bench import report
from bench.front import play_dataset
from bench.server import ServerProcess

MAX_DEVIATION = 0.1
SETTLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Side:
    """One key's clients: so many connections, each asking for answers of `tokens` tokens again and again."""

    name: str
    connections: int
    tokens: int


SIDES = (Side("many-long", 48, 200), Side("few-short", 16, 20))


def server_config(args: argparse.Namespace, weights: list[float]) -> dict[str, Any]:
    return {
        "worker": {"backend": "playback", "playback_tokens_per_second": args.token_rate},
        "scheduler": {"max_num_seqs": args.sequences},
        "cache": {"prefix_caching": False},
        "server": {"access_log": False, "metrics": True},
        "limits": {
            "api_keys": [
                {"name": side.name, "key": side.name, "weight": weight}
                for side, weight in zip(SIDES, weights, strict=True)
            ]
        },
        "log": {"level": "warning"},
    }


def start_load(server: ServerProcess, side: Side, folder: Path, seconds: float) -> subprocess.Popen[str]:
    dataset = folder / f"{side.name}.jsonl"
    play_dataset(dataset, side.tokens)
    command = [sys.executable, "-m", "bench.serve", "--url", server.url, "--api-key", side.name]
    command += ["--warmup", "0", "--dataset", str(dataset), "--duration", str(seconds)]
    command += ["--concurrency", str(side.connections)]
    return subprocess.Popen(
        command, cwd=report.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tokens_by_key(server: ServerProcess) -> dict[str, float]:
    """Prompt and generated tokens of each key's requests that have ended."""
    code, body = server.get("/metrics")
    if code != 200:
        raise RuntimeError(f"/metrics answered {code}")
    totals = dict.fromkeys((side.name for side in SIDES), 0.0)
    for family in text_string_to_metric_families(body.decode()):
        if family.name == "mlxd_key_tokens":
            for sample in family.samples:
                totals[sample.labels["key"]] += sample.value
    return totals


def measure(args: argparse.Namespace, weights: list[float]) -> dict[str, Any]:
    """Load the server from both sides; what each was given, and how far that is from its share."""
    with tempfile.TemporaryDirectory() as name, ServerProcess(server_config(args, weights)) as server:
        folder = Path(name)
        loads = [start_load(server, side, folder, args.seconds + 2 * SETTLE_SECONDS) for side in SIDES]
        try:
            time.sleep(SETTLE_SECONDS)
            before, started = tokens_by_key(server), time.monotonic()
            time.sleep(args.seconds)
            after, seconds = tokens_by_key(server), time.monotonic() - started
        finally:
            for load in loads:
                output, _ = load.communicate(timeout=120)
                if load.returncode:
                    raise RuntimeError(f"the load failed:\n{output}")
    given = {key: after[key] - before[key] for key in after}
    shares = {key: given[key] / sum(given.values()) for key in given}
    due = {side.name: weight / sum(weights) for side, weight in zip(SIDES, weights, strict=True)}
    return {
        "seconds": seconds,
        "tokens": given,
        "shares": shares,
        "due": due,
        "deviation": max(abs(shares[key] / due[key] - 1) for key in due),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when each key is within a tenth of its share, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.fairness", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="1:1", help="of the side with many long, and few short requests")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--sequences", type=int, default=8, help="that run at once")
    parser.add_argument("--token-rate", type=float, default=200.0, help="tokens/s of each sequence")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    weights = [float(weight) for weight in args.weights.split(":")]
    console = Console()
    try:
        result = measure(args, weights)
    except RuntimeError as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    for side in SIDES:
        console.print(
            f"{side.name} ({side.connections} connections, {side.tokens} tokens an answer): "
            f"{result['tokens'][side.name]:,.0f} tokens, {result['shares'][side.name]:.1%} "
            f"of {result['due'][side.name]:.1%} due"
        )
    console.print(f"deviation {result['deviation']:.1%} in {result['seconds']:.1f} s")
    if args.out is not None:
        flags = {key: value for key, value in vars(args).items() if key != "out"}
        sides = [asdict(side) for side in SIDES]
        head = report.provenance("fairness", flags=flags | {"sides": sides}, seed=None)
        report.write(args.out, head | {"result": result})
    return 0 if result["deviation"] <= MAX_DEVIATION else 1


if __name__ == "__main__":
    sys.exit(main())
