"""What grammars cost a step: `python -m bench.engine.grammar --model demo:smollm2`.

It does not know schemas' meaning or requests. Two figures: microseconds of one row's mask in one step, over
random walks through several grammars on the model's own vocabulary; and how much longer a step of the whole
batch takes when one of its rows is constrained, the two batches taking turns in one run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import report
from mlxd.chat import structured
from mlxd.config import ModelConfig
from mlxd.step import GrammarSpec, SamplingParams
from mlxd.worker import platform

MIN_ITEMS = 100_000
"""in the list that the constrained row writes, so that it never comes to its end"""
WALK_TOKENS = 400

_TEXT = {"type": "string"}
_PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "full_name": _TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "favourite_colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "born": {"type": "string", "format": "date"},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/person"}},
    },
    "required": ["full_name", "age", "email", "favourite_colours"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat object": {"type": "object", "properties": {"city": _TEXT, "days": {"type": "integer"}}},
    "recursive people": {"$defs": {"person": _PERSON}, "$ref": "#/$defs/person"},
    "any object": structured.ANY_OBJECT,
    "list of texts": {"type": "array", "items": _TEXT, "minItems": MIN_ITEMS},
}


@dataclass(frozen=True, slots=True)
class MaskCost:
    """Microseconds a row and step: following one token and computing what may come next."""

    grammar: str
    num_tokens: int
    median_us: float
    p99_us: float
    max_us: float


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Median seconds a step; `factor` is the median over the turns of one step over the other."""

    sampling: str
    batch: int
    context: int
    free_seconds: float
    constrained_seconds: float
    factor: float


def grammar_text(schema: dict[str, Any]) -> str:
    return structured.compose("@answer", {"answer": structured.json_schema(schema, "schema").grammar})


class _Sampled:
    """A step of one row that has sampled what it is told."""

    def __init__(self, token: int) -> None:
        self._tokens = np.array([token], dtype=np.int32)

    def tokens(self) -> npt.NDArray[np.int32]:
        return self._tokens


def measure_masks(tokenizer_file: Path, vocab_size: int, stop: int, seed: int) -> list[MaskCost]:
    from mlxd.worker.grammar import ConstrainedRow, Vocabulary

    vocabulary = Vocabulary(tokenizer_file, vocab_size)
    source = random.Random(seed)
    costs = []
    for name, schema in SCHEMAS.items():
        text = grammar_text(schema)
        seconds: list[float] = []
        while len(seconds) < 2 * WALK_TOKENS:
            compiled: Future[Any] = Future()
            compiled.set_result(vocabulary.matcher(text))
            row = ConstrainedRow(GrammarSpec(text, stop_token_ids=(stop,)), vocabulary, compiled, [])
            for _ in range(WALK_TOKENS):
                start = time.perf_counter()
                constraint = row.constraint()
                seconds.append(time.perf_counter() - start)
                assert constraint.bitmask is not None and constraint.error is None
                allowed = np.flatnonzero(np.unpackbits(constraint.bitmask, bitorder="little"))
                token = int(source.choice(allowed))
                if token == stop:
                    break
                row.sampled(_Sampled(token), 0)
        figures = np.array(seconds) * 1e6
        costs.append(
            MaskCost(
                name, len(seconds), float(np.median(figures)), *np.percentile(figures, (99, 100)).tolist()
            )
        )
    return costs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine.grammar", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="demo:smollm2", help="a folder, hub id, .gguf or demo:smollm2")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="in a turn")
    parser.add_argument("--rounds", type=int, default=12, help="turns for each")
    parser.add_argument("--threads", type=int, default=0, help="of the BLAS; 0 is one a core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    blas = platform.prepare(args.threads)
    # Only now may anything import MLX.
    from bench.engine.contenders import MlxdDecode
    from mlxd.worker.loader import open_model
    from mlxd.worker.model_source import resolve_model

    device = platform.detect_device()
    options = ModelConfig(path=args.model, dtype=args.dtype)
    folder = resolve_model(options, lambda _: None, lambda _: None)
    loaded = open_model(folder, options, device.kind).load(lambda _: None)
    tokenizer_file = folder / "tokenizer.json"
    max_steps = (args.rounds + 1) * (args.steps + 2)
    results = []
    stop = 0
    for name, free in {
        "greedy": SamplingParams(temperature=0.0),
        "temperature 1": SamplingParams(seed=1),
    }.items():
        text = grammar_text(SCHEMAS["list of texts"])
        constrained = SamplingParams(
            temperature=free.temperature, seed=1, grammar=GrammarSpec(text, stop_token_ids=(stop,))
        )
        batches = [
            MlxdDecode(
                loaded.model,
                loaded.dtype,
                [args.context] * args.batch,
                max_steps,
                device=device,
                sampling=[first, *[free] * (args.batch - 1)],
                tokenizer_file=tokenizer_file,
            )
            for first in (free, constrained)
        ]
        turns = [[statistics.mean(batch.steps(args.steps)) for batch in batches] for _ in range(args.rounds)]
        free_times, constrained_times = zip(*turns[1:], strict=True)  # the first warms up
        factor = statistics.median(b / a for a, b in turns[1:])
        free_seconds, constrained_seconds = map(statistics.median, (free_times, constrained_times))
        results.append(Slowdown(name, args.batch, args.context, free_seconds, constrained_seconds, factor))
        vocab_size = batches[0].runner.vocab_size
    masks = measure_masks(tokenizer_file, vocab_size, stop, args.seed)
    for cost in masks:
        print(
            f"mask, {cost.grammar}: median {cost.median_us:.0f} us, p99 {cost.p99_us:.0f}, "
            f"most {cost.max_us:.0f} ({cost.num_tokens} tokens)"
        )
    for result in results:
        print(
            f"{result.sampling}, {result.batch} rows at {result.context}: "
            f"a step {result.free_seconds * 1e3:.1f} ms, "
            f"with one row constrained {result.constrained_seconds * 1e3:.1f} ms: x {result.factor:.3f}"
        )
    if args.out is not None:
        flags = {key: value for key, value in vars(args).items() if key != "out"}
        head = report.provenance("grammar", flags=flags, seed=args.seed)
        facts = {"device": str(device), "blas": asdict(blas), "dtype": str(loaded.dtype)}
        figures = {"masks": [asdict(row) for row in masks], "slowdown": [asdict(row) for row in results]}
        report.write(args.out, head | facts | {"result": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
