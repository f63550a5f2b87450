"""What embeddings cost the chats that stream meanwhile, and how fast they are alone.

It does not know how the server shares the machine. One server has a chat model and an embedding model. Chats
stream all the time, in a closed loop; after some seconds a client embeds texts, then the chats go on alone. A
gap between two chunks of a chat counts as `during` if it ends while texts are embedded, else as `alone`; at
the end the same texts are embedded once more without chats.

`python -m bench.embeddings [--texts 1000] [--chats 16] [--nice 10] [--threads 1]`
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from bench import report
from bench.serve.http import Address
from bench.serve.load import Client
from bench.serve.record import Record
from bench.serve.summary import percentiles
from bench.serve.workload import WORDS, Lengths, RequestSpec, Workload
from bench.server import ServerProcess

MAX_RATIO = 2.0
WARM_UP_SECONDS = 3.0
"""Of chats that nobody counts: the first ones all begin at once."""


@dataclass(frozen=True, slots=True)
class EmbeddingWorkload(Workload):
    """The path is another; the bodies are made by hand."""

    @property
    def path(self) -> str:
        return "/v1/embeddings"


def server_config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"path": args.model},
        "embeddings": {"model": args.embedding_model, "nice": args.nice, "threads": args.threads},
        "cache": {"memory_mb": 1024},
        "server": {"access_log": False},
        "log": {"level": "warning"},
    }


def texts_body(num_texts: int, num_words: Lengths, seed: int) -> bytes:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=num_words.draw(draw))) for _ in range(num_texts)]
    return orjson.dumps({"input": texts, "encoding_format": "base64"})


def gaps_by_end(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(when it ended, seconds) of each gap between two chunks."""
    gaps = []
    for record in records:
        if record.first_text is not None:
            ends = accumulate(record.gaps, initial=record.first_text)
            next(ends)
            gaps += list(zip(ends, record.gaps, strict=True))
    return gaps


async def embed(client: Client, body: bytes) -> tuple[float, float, int]:
    """Start, end, and the number of tokens. Raises RuntimeError when it fails."""
    start = time.perf_counter()
    record = await client.run(RequestSpec(0, body, None))
    if record.outcome != "ok":
        raise RuntimeError(f"embedding failed: {record.outcome} {record.error_message}")
    return start, time.perf_counter(), record.prompt_tokens


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    chats = Workload(seed=args.seed, prompt_tokens=Lengths("fixed", 32), output_tokens=args.output_tokens)
    address = Address.parse(url)
    chat_client = Client(address, chats, clock=time.perf_counter)
    embedding_client = Client(
        address, EmbeddingWorkload(seed=args.seed, stream=False), clock=time.perf_counter
    )
    body = texts_body(args.texts, args.words, args.seed)
    started = time.perf_counter()
    alone = WARM_UP_SECONDS + args.seconds
    stop = asyncio.Event()

    async def chat(number: int) -> list[Record]:
        records = []
        while not stop.is_set():
            records.append(await chat_client.run(chats.request(number + args.chats * len(records))))
        return records

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(chat(number)) for number in range(args.chats)]
            await asyncio.sleep(alone)
            begin, end, num_tokens = await embed(embedding_client, body)
            await asyncio.sleep(args.seconds / 2)
            stop.set()
        records = [record for task in running for record in task.result()]
        quiet_begin, quiet_end, _ = await embed(embedding_client, body)
    finally:
        chat_client.pool.close()
        embedding_client.pool.close()
    failed = [record.error_message for record in records if record.outcome != "ok"]
    if failed:
        raise RuntimeError(f"{len(failed)} chats failed: {failed[0]}")
    gaps = [gap for gap in gaps_by_end(records) if gap[0] > started + WARM_UP_SECONDS]
    during = percentiles(seconds for ended, seconds in gaps if begin <= ended <= end)
    outside = percentiles(seconds for ended, seconds in gaps if not begin <= ended <= end)
    if during is None or outside is None:
        raise RuntimeError("no chat streamed while texts were embedded")
    return {
        "num_tokens": num_tokens,
        "chat_itl_alone": outside,
        "chat_itl_during": during,
        "itl_p99_ratio": during["p99"] / outside["p99"],
        "texts_per_second_during": args.texts / (end - begin),
        "texts_per_second_alone": args.texts / (quiet_end - quiet_begin),
        "tokens_per_second_alone": num_tokens / (quiet_end - quiet_begin),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the chats' p99 gap less than doubles, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.embeddings", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--embedding-model", default="demo:minilm")
    parser.add_argument("--chats", type=int, default=16, help="that stream at once")
    parser.add_argument("--output-tokens", type=Lengths.parse, default=Lengths("uniform", 64, 192))
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--words", type=Lengths.parse, default=Lengths("uniform", 8, 32), help="of a text")
    parser.add_argument("--seconds", type=float, default=20.0, help="of chats alone before the texts come")
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    console = Console()
    try:
        with ServerProcess(server_config(args), ready_seconds=600) as server:
            result = asyncio.run(measure(server.url, args))
    except (RuntimeError, ExceptionGroup) as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    for name in ("chat_itl_alone", "chat_itl_during"):
        figures = ", ".join(f"{key} {value:.0f}" for key, value in result[name].items())
        console.print(f"{name} in ms: {figures}", highlight=False)
    console.print(
        f"p99 ratio {result['itl_p99_ratio']:.2f}; {args.texts} texts of {result['num_tokens']} tokens: "
        f"{result['texts_per_second_during']:.0f} texts/s beside {args.chats} chats, "
        f"{result['texts_per_second_alone']:.0f} texts/s ({result['tokens_per_second_alone']:.0f} tokens/s) "
        "alone",
        highlight=False,
    )
    if args.out is not None:
        flags = {key: str(value) for key, value in vars(args).items() if key != "out"}
        report.write(
            args.out, report.provenance("embeddings", flags=flags, seed=args.seed) | {"result": result}
        )
    return 0 if result["itl_p99_ratio"] < MAX_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
