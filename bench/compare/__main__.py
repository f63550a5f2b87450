"""The command line of bench.compare: start each server, ask it everything, write JSON, table and plots.

It does not know HTTP or statistics: bench.serve does.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from bench import report
from bench.compare.contenders import CONTENDERS, Contender
from bench.compare.process import ServerUnderTest, blas_environment, free_port
from bench.compare.table import markdown
from bench.compare.workloads import Scenario, scenarios
from bench.serve.http import Address
from bench.serve.load import Client
from bench.serve.summary import summarise
from bench.serve.workload import arrivals

READY_SECONDS = 300.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder that all of them can load")
    add(
        "--servers",
        default="mlxd,mlx-lm",
        help=f"of {', '.join(CONTENDERS)}; mlxd and mlx-lm run in this environment",
    )
    add("--other", action="append", default=[], metavar="NAME=VENV", help="where another server is installed")
    add("--clients", default="1,4,16,32,64", help="closed loop: so many at a time, for each a run")
    add("--output-tokens", type=int, default=32)
    add("--requests-per-client", type=int, default=2)
    add("--rate", type=float, default=1.0, help="open loop: requests a second")
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="for each request")
    add("--seed", type=int, default=0)
    add(
        "--out",
        type=Path,
        help="the result as JSON; a table (.md) and, with matplotlib, plots (.png) go beside it",
    )
    return parser


async def measure(
    scenario: Scenario, contender: Contender, server: ServerUnderTest, model: str, timeout_seconds: float
) -> dict[str, Any]:
    """One run of one scenario against one server, after a warm-up that does not count."""
    workload = dataclasses.replace(scenario.workload, model=model)
    client = Client(
        Address.parse(f"http://127.0.0.1:{server.port}"),
        workload,
        clock=time.perf_counter,
        timeout_seconds=timeout_seconds,
    )
    try:
        client.workload = dataclasses.replace(workload, calibration=await client.calibrate())
        await client.closed_loop(concurrency=1, num_requests=1, seconds=None, first_index=10**9)
        cpu, own = server.cpu_seconds(), time.process_time()
        gc.collect()
        if scenario.clients:
            load = await client.closed_loop(
                concurrency=scenario.clients, num_requests=scenario.num_requests, seconds=None
            )
        else:
            due = arrivals(scenario.rate, "poisson", workload.seed)
            load = await client.open_loop(due, num_requests=scenario.num_requests, seconds=None)
        result: dict[str, Any] = summarise(load, client_cpu_seconds=time.process_time() - own)
        return result | {"server_cpu_seconds": server.cpu_seconds() - cpu}
    finally:
        client.pool.close()


def run_server(
    contender: Contender, python: Path, args: argparse.Namespace, plan: list[Scenario], console: Console
) -> dict[str, Any]:
    """All scenarios against one server. A scenario that fails says so in its place."""
    port = free_port()
    max_clients = max((scenario.clients for scenario in plan), default=1)
    command = contender.command(python, args.model, port, max_clients)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        log = Path(folder) / "log"
        with ServerUnderTest(command, port, blas_environment(), log) as server:
            server.wait_healthy(contender.health_path, READY_SECONDS)
            console.print(f"[bold]{contender.name}[/] is up after {server.start_seconds:.1f} s")
            for scenario in plan:
                model = str(args.model) if contender.needs_model_name else "default"
                try:
                    result = uvloop.run(measure(scenario, contender, server, model, args.timeout))
                except Exception as error:
                    result = {"failed": f"{type(error).__name__}: {error}"[:500]}
                    if server.process.poll() is not None:
                        result["failed"] += f"; the server is gone: {log.read_text(errors='replace')[-500:]}"
                results[scenario.name] = result
                speed = result.get("output_tokens_per_second")
                console.print(
                    f"  {scenario.name}: " + (f"{speed:.1f} tokens/s" if speed else str(result)[:300])
                )
            return {
                "versions": contender.version(python),
                "command": [part.replace(str(Path.home()), "~") for part in command[2:]],
                "start_seconds": server.start_seconds,
                "peak_rss_bytes": server.peak_bytes,
                "scenarios": results,
            }


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every server was measured, 1 when one could not be, 2 for wrong flags."""
    parser = build_parser()
    args = parser.parse_args(argv)
    console = Console()
    pythons = {"mlxd": Path(sys.executable), "mlx-lm": Path(sys.executable)}
    for other in args.other:
        name, _, venv = other.partition("=")
        pythons[name] = Path(venv).resolve() / "bin" / "python"
    names = [name for name in [*args.servers.split(","), *(o.partition("=")[0] for o in args.other)] if name]
    unknown = [name for name in names if name not in CONTENDERS or name not in pythons]
    if unknown:
        parser.error(f"{unknown[0]!r} is not known, or needs --other {unknown[0]}=VENV")
    args.model = args.model.resolve()
    # A server that is being measured must not outlive us, however we are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clients = [int(number) for number in args.clients.split(",")]
    plan = scenarios(
        clients=clients,
        output_tokens=args.output_tokens,
        requests_per_client=args.requests_per_client,
        rate=args.rate,
        seed=args.seed,
    )
    flags = {key: str(value) for key, value in vars(args).items() if key not in ("out", "other")}
    results: dict[str, Any] = {}
    result = report.provenance("compare", flags=flags, seed=args.seed) | {"result": results}
    for name in dict.fromkeys(names):
        try:
            results[name] = run_server(CONTENDERS[name], pythons[name], args, plan, console)
        except (RuntimeError, OSError) as error:
            console.print(f"[red]{name}: {error}[/]", highlight=False)
            results[name] = {"failed": str(error)[:2000]}
        if args.out is not None:  # after each, since the next may take long
            report.write(args.out, result)
            args.out.with_suffix(".md").write_text(markdown(result))
    console.print(markdown(result), markup=False, highlight=False)
    if args.out is not None:
        try:
            from bench.compare.plots import draw
        except ModuleNotFoundError as error:
            console.print(f"no plots: {error.name} is not installed")
        else:
            draw(result, args.out.with_suffix(".png"))
    return 1 if any("failed" in server for server in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
