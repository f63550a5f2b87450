"""The command line of bench.serve: flags to workload, run, table, JSON.

It does not know HTTP or statistics; see load.py and summary.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import time
from pathlib import Path

import orjson
import uvloop
from rich.console import Console

from bench import report
from bench.serve.http import Address
from bench.serve.load import Client, Load
from bench.serve.summary import print_summary, summarise
from bench.serve.workload import Lengths, Workload, arrivals, read_dataset


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="http://host:port, https://… or unix:/path")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    add("--model", default="default")
    add("--api", choices=("chat", "completions"), default="chat")
    add("--stream", action=argparse.BooleanOptionalAction, default=True)
    add("--keep-alive", action=argparse.BooleanOptionalAction, default=True)
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="for each request")
    load = parser.add_argument_group("load")
    pace = load.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=int, default=8, help="closed loop: so many at a time")
    pace.add_argument("--rate", type=float, help="open loop: requests a second")
    load.add_argument("--arrivals", choices=("poisson", "fixed"), default="poisson")
    load.add_argument("--requests", type=int, help="how many (default 100 unless --duration is given)")
    load.add_argument("--duration", type=float, metavar="SECONDS", help="send for so long")
    load.add_argument("--warmup", type=int, default=2, help="requests before, which do not count")
    load.add_argument("--abort-fraction", type=float, default=0.0, help="share of streams cut off at random")
    load.add_argument("--invalid-fraction", type=float, default=0.0, help="share of wrong requests")
    load.add_argument("--seed", type=int, default=0)
    what = parser.add_argument_group("requests (lengths: N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA[:MAX])")
    what.add_argument("--prompt-tokens", type=Lengths.parse, default=Lengths("fixed", 128), metavar="LENGTH")
    what.add_argument("--output-tokens", type=Lengths.parse, default=Lengths("fixed", 128), metavar="LENGTH")
    what.add_argument("--shared-prefix", type=float, default=0.0, help="share of the prompt that all share")
    what.add_argument("--dataset", type=Path, help="JSONL: messages or prompt, max_tokens, body")
    what.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    what.add_argument("--body", type=orjson.loads, default={}, help="JSON with more fields; null drops one")
    what.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, default=True, help="measure tokens a word first"
    )
    add("--out", type=Path, help="write the result as JSON")
    return parser


def build_workload(args: argparse.Namespace) -> Workload:
    """The workload that the flags describe. Raises ValueError for what does not fit together."""
    for name in ("abort_fraction", "invalid_fraction", "shared_prefix"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1")
    if args.rate is not None and args.rate <= 0:
        raise ValueError("--rate must be above 0")
    if args.concurrency < 1:
        raise ValueError("--concurrency must be at least 1")
    if args.abort_fraction and not args.stream:
        raise ValueError("--abort-fraction needs --stream")
    if not isinstance(args.body, dict):
        raise ValueError("--body must be a JSON object")
    dataset = read_dataset(args.dataset) if args.dataset else []
    for row in dataset:
        if row.messages is not None and args.api == "completions":
            raise ValueError("the data set has `messages`: use --api chat")
        if isinstance(row.prompt, list) and args.api == "chat":
            raise ValueError("the data set has token ids: use --api completions")
    return Workload(
        seed=args.seed,
        model=args.model,
        api=args.api,
        stream=args.stream,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        shared_prefix=args.shared_prefix,
        abort_fraction=args.abort_fraction,
        invalid_fraction=args.invalid_fraction,
        temperature=args.temperature,
        body=args.body,
        dataset=dataset,
    )


async def run(args: argparse.Namespace, workload: Workload) -> tuple[Load, float]:
    """Calibrate, warm up, measure. Returns the load and the CPU seconds that this process spent on it."""
    client = Client(
        Address.parse(args.url),
        workload,
        clock=time.perf_counter,
        api_key=args.api_key,
        keep_alive=args.keep_alive,
        timeout_seconds=args.timeout,
    )
    try:
        return await _measure(client, args)
    finally:
        # uvloop does not end while connections are open.
        client.pool.close()


async def _measure(client: Client, args: argparse.Namespace) -> tuple[Load, float]:
    if args.calibrate and not client.workload.dataset:
        client.workload = dataclasses.replace(client.workload, calibration=await client.calibrate())
    if args.warmup:
        # Indices that the run does not use, so that no prompt is in a prefix cache before its time.
        measured = client.workload
        client.workload = dataclasses.replace(measured, abort_fraction=0.0)
        concurrency = min(args.warmup, args.concurrency)
        warm = await client.closed_loop(
            concurrency=concurrency, num_requests=args.warmup, seconds=None, first_index=1_000_000_000
        )
        client.workload = measured
        if all(record.outcome not in ("ok", "cut") for record in warm.records):
            record = warm.records[0]
            raise RuntimeError(f"every warm-up request failed: {record.outcome} {record.error_message}")
    num_requests = args.requests if args.requests or args.duration else 100
    # A collection over everything imported would be a pause of ours in every stream.
    gc.collect()
    gc.freeze()
    cpu = time.process_time()
    try:
        if args.rate is not None:
            due_times = arrivals(args.rate, args.arrivals, args.seed)
            load = await client.open_loop(due_times, num_requests=num_requests, seconds=args.duration)
        else:
            load = await client.closed_loop(
                concurrency=args.concurrency, num_requests=num_requests, seconds=args.duration
            )
    finally:
        gc.unfreeze()
    return load, time.process_time() - cpu


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every request ended well, 1 when some failed, 2 for wrong flags."""
    parser = build_parser()
    args = parser.parse_args(argv)
    console = Console()
    try:
        workload = build_workload(args)
        Address.parse(args.url)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        load, cpu = uvloop.run(run(args, workload))
    except RuntimeError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return 1
    summary = summarise(load, client_cpu_seconds=cpu)
    print_summary(summary, console)
    if args.out is not None:
        flags = {name: _flag(value) for name, value in vars(args).items() if name not in ("api_key", "out")}
        report.write(args.out, report.provenance("serve", flags=flags, seed=args.seed) | {"result": summary})
    return 1 if summary["errors"] else 0


def _flag(value: object) -> object:
    if isinstance(value, Lengths):
        return dataclasses.asdict(value)
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(main())
