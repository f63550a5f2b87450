"""`python -m bench.engine.alone`: requests through scheduler and runner in one process, without HTTP or text.

It does not know clients: what it serves is the most that a server over this engine could. Closed loop: a
request that ends is replaced at once, until all have been sent.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from bench import report
from mlxd.config import Config, ModelConfig, SchedulerConfig
from mlxd.engine.kv_manager import KvManager
from mlxd.engine.request import GenerationRequest, Request, RequestStatus
from mlxd.engine.scheduler import Scheduler
from mlxd.engine.step_builder import ScheduledStep
from mlxd.step import SamplingParams, StepResult, WorkerReady
from mlxd.worker import lean_import, platform

if TYPE_CHECKING:
    from mlxd.worker.mlx_backend import MlxBackend
    from mlxd.worker.runner import PendingStep


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked, and of how many at a time."""

    num_requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int


class EngineAlone:
    """One step in flight, as in the server."""

    def __init__(self, backend: MlxBackend, info: WorkerReady, config: Config) -> None:
        self._backend = backend
        self._vocab_size = info.vocab_size
        kv = KvManager(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=info.max_model_len,
            prefix_caching=info.shares_prefixes,
            num_snapshots=info.num_snapshots,
        )
        self._scheduler = Scheduler(config.scheduler, kv)
        self.step_seconds: list[tuple[int, int, float, float]] = []
        """(decode rows, chunk tokens, seconds from the last one's end, seconds to launch it) of every step"""

    def run(self, work: Work) -> float:
        """Seconds from the first request's arrival to the last one's end."""
        requests = (self._request(index, work) for index in range(work.num_requests))
        for request in itertools.islice(requests, work.concurrency):
            self._scheduler.add(request)
        start = last = time.perf_counter()
        flying: tuple[ScheduledStep, PendingStep, float] | None = None
        while True:
            begin = time.perf_counter()
            step = self._scheduler.schedule(begin)
            following = None
            if step is not None:
                launched = self._backend.launch(step.plan)
                following = step, launched, time.perf_counter() - begin
            if flying is not None:
                result = flying[1].result()
                now = time.perf_counter()
                self.step_seconds.append(
                    (flying[0].num_decode_rows, flying[0].num_chunk_tokens, now - last, flying[2])
                )
                self._finish(flying[0], result, now - last, requests)
                last = now
            elif following is None:
                return time.perf_counter() - start
            flying = following

    def _finish(self, step: ScheduledStep, result: StepResult, seconds: float, more: Any) -> None:
        self._scheduler.update(step, seconds)
        tokens = memoryview(result.token_ids).cast("i")
        for request, token in zip(step.sampled, tokens, strict=True):
            if request.status.is_finished:
                continue
            request.output_token_ids.append(token)
            if len(request.output_token_ids) == request.max_tokens:
                self._scheduler.finish(request, RequestStatus.FINISHED_LENGTH)
                if (another := next(more, None)) is not None:
                    self._scheduler.add(another)

    def _request(self, index: int, work: Work) -> Request:
        prompt = random.Random(index).choices(range(self._vocab_size), k=work.prompt_tokens)
        params = GenerationRequest(
            request_id=f"alone-{index}",
            prompt_token_ids=prompt,
            max_tokens=work.output_tokens,
            sampling=SamplingParams(temperature=0.0),
        )
        return Request(
            params,
            stream=cast(Any, None),
            detokenizer=cast(Any, None),
            stop_token_ids=frozenset(),
            max_tokens=work.output_tokens,
            arrival_time=0.0,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine.alone", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-step-ms", type=float, default=200.0)
    parser.add_argument("--repeats", type=int, default=2, help="the last one counts")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    blas = platform.prepare()
    lean_import.install()
    from mlxd.worker.mlx_backend import MlxBackend

    config = Config(
        model=ModelConfig(path=args.model),
        scheduler=SchedulerConfig(
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_step_ms=args.max_step_ms,
        ),
    )
    console = Console()
    backend = MlxBackend(config, lambda _: None, blas)
    start = time.perf_counter()
    info = backend.load()
    console.print(f"{info.device}, {info.attention} attention, loaded in {time.perf_counter() - start:.1f} s")
    for warning in info.warnings:
        console.print(warning)
    work = Work(args.requests, args.concurrency, args.prompt_tokens, args.output_tokens)
    seconds = 0.0
    for repeat in range(args.repeats):
        engine = EngineAlone(backend, info, config)
        seconds = engine.run(work)
        rate = work.num_requests * work.output_tokens / seconds
        console.print(f"run {repeat + 1}: {seconds:.2f} s, {rate:,.0f} output tokens/s")
        for name, chosen in (("without chunks", False), ("with chunks", True)):
            steps = sorted(step[2] * 1e3 for step in engine.step_seconds if (step[1] > 0) == chosen)
            if steps:
                p50, p90, p99 = (steps[int(share * len(steps))] for share in (0.5, 0.9, 0.99))
                figures = f"p50 {p50:.1f}, p90 {p90:.1f}, p99 {p99:.1f}, max {steps[-1]:.1f}"
                console.print(f"  {len(steps)} steps {name}, ms: {figures}")
    if args.out is not None:
        head = report.provenance("engine.alone", flags={k: str(v) for k, v in vars(args).items()}, seed=0)
        result = {
            "seconds": seconds,
            "output_tokens_per_second": work.num_requests * work.output_tokens / seconds,
            "steps": engine.step_seconds,
        }
        report.write(args.out, head | {"device": info.device, "attention": info.attention, "result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
