"""The command line of bench.engine: load once, let the contenders take turns, print ratios.

It does not know how a step is run (contenders.py) or planned (plans.py).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench import report
from mlxd.config import ModelConfig
from mlxd.worker import platform

if TYPE_CHECKING:
    from bench.engine.contenders import Contender
    from mlxd.worker.loader import LoadedModel

WARMUP_STEPS = 3


@dataclass(frozen=True, slots=True)
class Decode:
    """Median seconds a step of `batch` rows around `context` tokens."""

    batch: int
    context: int
    mlxd_seconds: float
    raw_seconds: float
    generator_seconds: float

    @property
    def of_raw(self) -> float:
        """mlxd's tokens/s over the raw step's."""
        return self.raw_seconds / self.mlxd_seconds

    @property
    def of_generator(self) -> float:
        return self.generator_seconds / self.mlxd_seconds


@dataclass(frozen=True, slots=True)
class Prefill:
    """Median seconds of a prompt of `length` tokens, alone and in one step with `batch` decode rows."""

    length: int
    batch: int
    context: int
    alone_seconds: float
    raw_seconds: float
    decode_seconds: float
    mixed_seconds: float

    @property
    def of_raw(self) -> float:
        """mlxd's prompt tokens/s over mlx-lm's."""
        return self.raw_seconds / self.alone_seconds

    @property
    def of_sum(self) -> float:
        """The mixed step over prompt and decode step apart; 1 or less is what we want."""
        return self.mixed_seconds / (self.alone_seconds + self.decode_seconds)


def numbers(text: str) -> list[int]:
    """`1,8,32`. Raises ValueError for anything but positive integers."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def take_turns(contenders: list[Contender], rounds: int, steps: int) -> list[float]:
    """Median seconds a step of each. They alternate, so that a busy machine is busy for all of them."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:
        contender.steps(WARMUP_STEPS)
    for _ in range(rounds):
        for contender, times in zip(contenders, seconds, strict=True):
            times += contender.steps(steps)
    return [statistics.median(times) for times in seconds]


def measure_decode(
    loaded: LoadedModel, device: platform.Device, batch: int, context: int, rounds: int, steps: int
) -> Decode:
    from bench.engine.contenders import GeneratorDecode, MlxdDecode, RawDecode

    model, dtype = loaded.model, loaded.dtype
    # Each call of steps() runs two steps more than it counts.
    max_steps = (rounds + 1) * (max(steps, WARMUP_STEPS) + 2)
    generator = GeneratorDecode(model, dtype, batch, context)
    try:
        mlxd, raw, other = take_turns(
            [
                MlxdDecode(model, dtype, [context] * batch, max_steps, device=device),
                RawDecode(model, dtype, [context] * batch),
                generator,
            ],
            rounds,
            steps,
        )
    finally:
        generator.close()
    gc.collect()
    return Decode(batch, context, mlxd, raw, other)


def measure_prefill(
    loaded: LoadedModel, device: platform.Device, length: int, batch: int, context: int, rounds: int
) -> Prefill:
    from bench.engine.contenders import MlxdDecode, raw_prefill

    max_steps = 9 * (rounds + 1)
    mlxd = MlxdDecode(
        loaded.model, loaded.dtype, [context] * batch, max_steps, max_chunk=length, device=device
    )
    alone, raw, decode, mixed = [], [], [], []
    mlxd.steps(1, chunk=length)
    for _ in range(rounds):
        alone += mlxd.chunks(1, length)
        raw += raw_prefill(loaded.model, length, 1)
        decode += mlxd.steps(3)
        mixed += mlxd.steps(2, chunk=length)
    return Prefill(
        length, batch, context, *(statistics.median(times) for times in (alone, raw, decode, mixed))
    )


def print_decode(rows: list[Decode], console: Console) -> None:
    table = Table(title="decode: ms a step, tokens/s", title_justify="left")
    for column in ("batch", "context", "mlxd ms", "raw ms", "mlx-lm ms", "mlxd tok/s", "of raw", "of mlx-lm"):
        table.add_column(column, justify="right")
    for row in rows:
        milliseconds = (row.mlxd_seconds, row.raw_seconds, row.generator_seconds)
        table.add_row(
            str(row.batch),
            str(row.context),
            *(f"{value * 1e3:.2f}" for value in milliseconds),
            f"{row.batch / row.mlxd_seconds:,.1f}",
            f"{row.of_raw:.2f}",
            f"{row.of_generator:.2f}",
        )
    console.print(table)


def print_prefill(rows: list[Prefill], console: Console) -> None:
    table = Table(title="prompts: ms, alone and beside decode rows", title_justify="left")
    for column in (
        "tokens",
        "mlxd ms",
        "raw ms",
        "mlxd tok/s",
        "of raw",
        "beside",
        "decode ms",
        "mixed ms",
        "of sum",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row.length),
            f"{row.alone_seconds * 1e3:.1f}",
            f"{row.raw_seconds * 1e3:.1f}",
            f"{row.length / row.alone_seconds:,.1f}",
            f"{row.of_raw:.2f}",
            f"{row.batch} x {row.context}",
            f"{row.decode_seconds * 1e3:.1f}",
            f"{row.mixed_seconds * 1e3:.1f}",
            f"{row.of_sum:.2f}",
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2", help="a folder, hub id, .gguf or demo:smollm2")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32])
    parser.add_argument("--context", type=numbers, default=[128, 512])
    parser.add_argument("--prefill", type=numbers, default=[256], help="prompt lengths")
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument(
        "--rounds", type=int, default=8, help="turns for each: short and many, as load comes and goes"
    )
    parser.add_argument("--threads", type=int, default=0, help="of the BLAS; 0 is one a core")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    blas = platform.prepare(args.threads)
    # Only now may anything import MLX.
    from mlxd.worker.loader import open_model
    from mlxd.worker.model_source import resolve_model

    console = Console()
    device = platform.detect_device()
    options = ModelConfig(path=args.model, dtype=args.dtype)
    folder = resolve_model(options, lambda _: None, lambda _: None)
    loaded = open_model(folder, options, device.kind).load(lambda _: None)
    console.print(f"{args.model}: {loaded.dtype} on {device}, BLAS {blas.name}, {blas.threads} threads")
    decode = [
        measure_decode(loaded, device, batch, context, args.rounds, args.steps)
        for context in args.context
        for batch in args.batch
    ]
    print_decode(decode, console)
    batch, context = max(args.batch), min(args.context)
    prefill = [
        measure_prefill(loaded, device, length, batch, context, args.rounds) for length in args.prefill
    ]
    print_prefill(prefill, console)
    if args.out is not None:
        flags = {key: value for key, value in vars(args).items() if key != "out"}
        head = report.provenance("engine", flags=flags, seed=None)
        facts = {"device": str(device), "blas": asdict(blas), "dtype": str(loaded.dtype)}
        figures = {
            "decode": [
                asdict(row) | {"of_raw": row.of_raw, "of_generator": row.of_generator} for row in decode
            ],
            "prefill": [asdict(row) | {"of_raw": row.of_raw, "of_sum": row.of_sum} for row in prefill],
        }
        report.write(args.out, head | facts | {"result": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
