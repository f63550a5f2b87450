"""Many short requests, some cut off mid-stream, some wrong; afterwards nothing may be left over.

It does not know how the server keeps its books: it asks /v1/status, /proc and bench._inside's probe. The
requests come in five slices, each from a client process of its own; memory is compared from the end of the
first slice (20 %) to the end of the last.

`python -m bench.soak [--requests 10000] [--model demo:smollm2]`; issue 3 asks for
`--concurrency 500 --abort-fraction 0.33 --invalid-fraction 0.1`.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from bench import report
from bench.front import play_dataset
from bench.server import ServerProcess, is_idle

SLICES = 5
MAX_RSS_GROWTH = 0.05
CONNECTION = "mlxd.server.protocol.Connection"
REMEMBERED = dict.fromkeys(
    (
        "mlxd.engine.request_log.EndedRequest",
        "mlxd.engine.prefix_report.PrefixReport",
        "mlxd.engine.prefix_report.PrefixHit",
    ),
    512,
)
"""Classes of which the front keeps the last so many on purpose."""


@dataclass(frozen=True, slots=True)
class Remains:
    """What a front holds when nothing runs."""

    used_blocks: int
    sockets: int
    rss_bytes: int
    objects: dict[str, int] = field(default_factory=dict)
    """of mlxd's classes, and unfinished asyncio tasks"""


@dataclass(frozen=True, slots=True)
class Soak:
    """What a soak sent and what it left. `before`: after the warm-up; `after[i]`: after slice i."""

    ok: int
    cut: int
    errors: dict[str, int]
    seconds: float
    before: Remains
    after: list[Remains]
    idle: bool
    integrity_errors: int
    refused: int | None = None
    """wrong requests that were refused; None where none were sent"""

    @property
    def rss_growth(self) -> float:
        """The largest RSS after the first slice over that of the first slice, minus 1."""
        return max(r.rss_bytes for r in self.after[1:]) / self.after[0].rss_bytes - 1

    def failures(self) -> list[str]:
        """What a clean soak would not show; empty when all is well."""
        last, found = self.after[-1], []
        if self.errors:
            found.append(f"requests failed: {self.errors}")
        if not self.cut:
            found.append("no stream was cut off: the soak showed nothing")
        if self.refused == 0:
            found.append("no wrong request was refused")
        if not self.idle:
            found.append("requests are left")
        if self.integrity_errors:
            found.append(f"the engine's integrity check failed {self.integrity_errors} times")
        if last.used_blocks > self.before.used_blocks:
            found.append(f"blocks in use: {self.before.used_blocks} before, {last.used_blocks} after")
        if last.sockets > self.before.sockets:
            found.append(f"sockets: {self.before.sockets} before, {last.sockets} after")
        for name, count in sorted(last.objects.items()):
            if count > max(self.before.objects.get(name, 0), REMEMBERED.get(name, 0)):
                found.append(f"{name}: {self.before.objects.get(name, 0)} before, {count} after")
        if self.rss_growth > MAX_RSS_GROWTH:
            found.append(f"RSS grew by {self.rss_growth:.1%}")
        return found


def remains(server: ServerProcess) -> Remains:
    """What is left once nothing runs and no connection is open, the last question's own included.

    A connection that will not close is waited for and then counted.
    """
    status = server.wait_idle()
    with contextlib.suppress(RuntimeError):
        server.wait_until(lambda: CONNECTION not in server.objects(), 5.0, "connections to close")
    return Remains(
        used_blocks=status["cache"]["used_blocks"],
        sockets=server.num_sockets(),
        rss_bytes=server.rss_bytes(),
        objects=server.objects(),
    )


def run_slice(
    args: argparse.Namespace, server: ServerProcess, folder: Path, *, requests: int, seed: int
) -> dict[str, Any]:
    """One client process; its result."""
    out = folder / "result.json"
    command = [sys.executable, "-m", "bench.serve", "--url", server.url, "--warmup", "0", "--out", str(out)]
    command += ["--requests", str(requests), "--concurrency", str(args.concurrency), "--seed", str(seed)]
    command += ["--abort-fraction", str(args.abort_fraction)]
    command += ["--invalid-fraction", str(args.invalid_fraction)]
    if args.model is None:
        dataset = folder / "dataset.jsonl"
        play_dataset(dataset, args.tokens)
        command += ["--dataset", str(dataset)]
    else:
        command += ["--prompt-tokens", "uniform:16:48", "--output-tokens", str(args.tokens)]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    if not out.exists():
        raise RuntimeError(f"the load failed:\n{done.stdout}{done.stderr}")
    result: dict[str, Any] = orjson.loads(out.read_bytes())["result"]
    out.unlink()
    return result


def soak(args: argparse.Namespace) -> Soak:
    """Start a server, send everything, look at what is left."""
    config = {
        "model": {"path": args.model},
        "worker": {
            "backend": "playback" if args.model is None else "mlx",
            "playback_tokens_per_second": args.token_rate,
        },
        "server": {"access_log": False},
        "log": {"level": "warning"},
    }
    with (
        tempfile.TemporaryDirectory() as name,
        ServerProcess(config, probe=True, ready_seconds=600) as server,
    ):
        folder = Path(name)
        run_slice(args, server, folder, requests=max(20, args.concurrency), seed=1000)
        before = remains(server)
        results, after = [], []
        for number in range(SLICES):
            results.append(run_slice(args, server, folder, requests=args.requests // SLICES, seed=number))
            after.append(remains(server))
        status = server.status()
    errors: dict[str, int] = {}
    for result in results:
        for kind, count in result["errors"].items():
            errors[kind] = errors.get(kind, 0) + count
    return Soak(
        ok=sum(result["ok"] for result in results),
        cut=sum(result["cut"] for result in results),
        errors=errors,
        seconds=sum(result["seconds"] for result in results),
        before=before,
        after=after,
        idle=is_idle(status),
        integrity_errors=status["integrity_errors"],
        refused=sum(result["refused"] for result in results) if args.invalid_fraction else None,
    )


def print_soak(result: Soak, console: Console) -> None:
    console.print(
        f"{result.ok} requests ok, {result.cut} cut off, {result.refused or 0} wrong ones refused, "
        f"errors {result.errors or 'none'}, "
        f"{result.seconds:.1f} s"
    )
    table = Table(title="what is left", title_justify="left")
    for column in ("after", "blocks", "sockets", "tasks", "RSS MB"):
        table.add_column(column, justify="right")
    rows = [("warm-up", result.before)]
    rows += [(f"{(i + 1) * 100 // SLICES} %", left) for i, left in enumerate(result.after)]
    for name, left in rows:
        tasks = left.objects.get("asyncio.Task", 0)
        table.add_row(
            name, str(left.used_blocks), str(left.sockets), str(tasks), f"{left.rss_bytes / 1e6:.1f}"
        )
    console.print(table)
    console.print(f"RSS from 20 % to 100 %: {result.rss_growth:+.1%}")
    for failure in result.failures():
        console.print(f"[red]{failure}[/]")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when nothing is left, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24, help="an answer")
    parser.add_argument("--abort-fraction", type=float, default=0.1)
    parser.add_argument("--invalid-fraction", type=float, default=0.0)
    parser.add_argument("--token-rate", type=float, default=400.0, help="playback: tokens/s of a stream")
    parser.add_argument("--model", help="a real one instead of playback")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    console = Console()
    try:
        result = soak(args)
    except RuntimeError as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    print_soak(result, console)
    if args.out is not None:
        flags = {key: value for key, value in vars(args).items() if key != "out"}
        head = report.provenance("soak", flags=flags, seed=0)
        figures = asdict(result) | {"rss_growth": result.rss_growth, "failures": result.failures()}
        report.write(args.out, head | {"result": figures})
    return 1 if result.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
