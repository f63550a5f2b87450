"""What a step costs the front: plan, encode and account for N running requests.

`python -m bench.micro.scheduler`. It knows no clients and no worker; the target is under 1 ms at 512.
"""

from __future__ import annotations

import time

import msgspec
from rich.console import Console
from rich.table import Table

from bench.report import provenance
from mlxd.config import SchedulerConfig
from mlxd.engine.kv_manager import KvManager
from mlxd.engine.request import GenerationRequest, Request
from mlxd.engine.scheduler import Scheduler

BLOCK_SIZE = 16
PROMPT_TOKENS = 500
STEPS = 200


class SilentDetokenizer:
    """Text is not measured here."""

    def add(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def decoding(num_requests: int) -> Scheduler:
    """A scheduler in which `num_requests` requests have been prefilled."""
    max_model_len = PROMPT_TOKENS + STEPS + BLOCK_SIZE
    blocks = 1 + num_requests * -(-max_model_len // BLOCK_SIZE)
    kv = KvManager(
        num_blocks=blocks, block_size=BLOCK_SIZE, max_num_seqs=num_requests, max_model_len=max_model_len
    )
    budget = num_requests * PROMPT_TOKENS
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=num_requests, max_num_batched_tokens=budget), kv)
    for i in range(num_requests):
        params = GenerationRequest(
            request_id=str(i), prompt_token_ids=[1] * PROMPT_TOKENS, max_tokens=STEPS + BLOCK_SIZE
        )
        scheduler.add(
            Request(
                params,
                stream=None,  # type: ignore[arg-type]  # nothing is handed out here
                detokenizer=SilentDetokenizer(),
                stop_token_ids=frozenset(),
                max_tokens=params.max_tokens,
                arrival_time=float(i),
            )
        )
    while any(not r.decoding for r in scheduler.running) or len(scheduler.waiting):
        step = scheduler.schedule(0.0)
        assert step is not None
        scheduler.update(step, 1e-3)
        append(step.sampled)
    return scheduler


def append(requests: list[Request]) -> None:
    for request in requests:
        request.output_token_ids.append(5)


def measure(num_requests: int) -> dict[str, float]:
    """Medians and maxima in microseconds over steps of `num_requests` decode rows."""
    scheduler = decoding(num_requests)
    encode = msgspec.msgpack.Encoder().encode
    seconds: dict[str, list[float]] = {"schedule": [], "encode": [], "update": []}
    clock = time.perf_counter
    num_bytes = 0
    for _ in range(STEPS):
        start = clock()
        step = scheduler.schedule(0.0)
        planned = clock()
        assert step is not None and step.num_decode_rows == num_requests
        num_bytes = len(encode(step.plan))
        encoded = clock()
        scheduler.update(step, 1e-3)
        seconds["update"].append(clock() - encoded)
        seconds["schedule"].append(planned - start)
        seconds["encode"].append(encoded - planned)
        append(step.sampled)
    row: dict[str, float] = {"plan_bytes": num_bytes}
    for name, values in seconds.items():
        values.sort()
        row[f"{name}_p50_us"] = round(values[len(values) // 2] * 1e6, 1)
        row[f"{name}_max_us"] = round(values[-1] * 1e6, 1)
    return row


def main() -> None:
    result = provenance("micro/scheduler", flags={"prompt_tokens": PROMPT_TOKENS, "steps": STEPS}, seed=None)
    rows = {num: measure(num) for num in (1, 32, 128, 512)}
    console = Console()
    console.print(f"{result['date']}  commit {result['commit']}  {result['machine']}")
    table = Table("requests", *next(iter(rows.values())))
    for num, row in rows.items():
        table.add_row(str(num), *(f"{value:g}" for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
