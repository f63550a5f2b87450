"""How long one large request holds the front up for everybody else.

It does not know what the front is made of. A thread asks for /health without a pause, on one connection,
while large requests of each kind are sent and answered: the slowest answer of /health is how long the front's
loop was held, give or take what the machine's scheduler adds (the row `nothing` shows that). A playback
worker, so that no model computes; embeddings come from the demo model, in its own process.

`python -m bench.stalls [--repeat 3] [--only NAME] [--no-embeddings]`
"""

from __future__ import annotations

import argparse
import http.client
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from bench import report
from bench.server import ServerProcess

TARGET_MS = 5.0
PROMPT_TOKENS = 130_000
"""about a megabyte of JSON as token ids; what the playback model's context takes"""
NUM_CHATS = 128
CHAT_CHARS = 2_500
CACHE_TOKENS = 2**20
CONFIG: dict[str, Any] = {
    "worker": {"backend": "playback", "playback_tokens_per_second": 5.0},
    "cache": {"num_blocks": CACHE_TOKENS // 16},
    "scheduler": {"max_num_seqs": 256, "max_queue": 2048},
    "server": {"access_log": False, "metrics": True},
    "log": {"level": "warning"},
}


class Pinger:
    """Asks for /health again and again; `slowest_ms` is of the time since `reset`."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.slowest_ms = 0.0

    def __enter__(self) -> Pinger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def reset(self) -> None:
        self.slowest_ms = 0.0

    def _run(self) -> None:
        while not self._stop.is_set():
            start = time.perf_counter()
            self._connection.request("GET", "/health")
            self._connection.getresponse().read()
            self.slowest_ms = max(self.slowest_ms, (time.perf_counter() - start) * 1e3)


class Client:
    """Sends requests; expects 200."""

    def __init__(self, url: str) -> None:
        self._host = url.removeprefix("http://")

    def send(self, method: str, path: str, *bodies: bytes) -> None:
        """One, or one for each body, all at once. Raises RuntimeError unless they are answered with 200."""
        headers = {"content-type": "application/json", "connection": "close"}
        connections = [http.client.HTTPConnection(self._host, timeout=120) for _ in bodies or (b"",)]
        try:
            for connection in connections:
                connection.connect()
            for connection, body in zip(connections, bodies or (b"",), strict=True):
                connection.request(method, path, body or None, headers)
            for connection in connections:
                response = connection.getresponse()
                answer = response.read()
                if response.status != 200:
                    raise RuntimeError(f"{method} {path}: {response.status} {answer[:300]!r}")
        finally:
            for connection in connections:
                connection.close()


def token_ids(number: int, count: int = PROMPT_TOKENS) -> list[int]:
    """Ids of the playback model, other ones for each `number`."""
    return [97 + (index * (number + 3) + index // 7) % 26 for index in range(count)]


Case = Callable[[int], Callable[[], object]]
"""Makes, of a number, what sends a request that was not sent before."""


def cases(client: Client, *, embeddings: bool) -> dict[str, Case]:
    """All of them, by name."""

    def post(path: str, body: Callable[[int], dict[str, Any]]) -> Case:
        return lambda number: partial(client.send, "POST", path, orjson.dumps(body(number)))

    def get(path: str) -> Case:
        return lambda number: partial(client.send, "GET", path)

    def clear(number: int) -> Callable[[], None]:
        """Once the cache is full."""
        for part in range(CACHE_TOKENS // PROMPT_TOKENS):
            prompt = token_ids(1000 + 10 * number + part)
            client.send("POST", "/v1/completions", orjson.dumps({"prompt": prompt, "max_tokens": 1}))
        return partial(client.send, "DELETE", "/v1/cache")

    def text(number: int, size: int = 1_000_000) -> str:
        return (f"Call {number}: the quick brown fox jumps over the lazy dog. " * (size // 50))[:size]

    def words(number: int, count: int) -> list[str]:
        return [f"Text {index} of call {number}, about nothing." for index in range(count)]

    def chats(number: int) -> Callable[[], None]:
        chat = [{"role": "user", "content": text(number, CHAT_CHARS)}]
        bodies = [orjson.dumps({"messages": chat, "user": f"{k}", **short}) for k in range(NUM_CHATS)]
        return partial(client.send, "POST", "/v1/chat/completions", *bodies)

    def turns(number: int) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": f"Turn {i} of {number}, short."} for i in range(3001)]

    short = {"max_tokens": 1}
    found = {
        "nothing": lambda number: partial(time.sleep, 0.5),
        "completion, token ids": post("/v1/completions", lambda n: {"prompt": token_ids(n), **short}),
        "completion, token ids, n=8": post(
            "/v1/completions", lambda n: {"prompt": token_ids(n), "n": 8, **short, "temperature": 1}
        ),
        "completion, text": post("/v1/completions", lambda n: {"prompt": text(n, PROMPT_TOKENS), **short}),
        "completion, 1,024 prompts": post("/v1/completions", lambda n: {"prompt": words(n, 1024), **short}),
        "chat, long message": post(
            "/v1/chat/completions",
            lambda n: {"messages": [{"role": "user", "content": text(n, PROMPT_TOKENS - 100)}], **short},
        ),
        f"{NUM_CHATS} chats at once": chats,
        "chat, 3,001 messages": post("/v1/chat/completions", lambda n: {"messages": turns(n), **short}),
        "messages, 3,001 messages": post(
            "/v1/messages", lambda n: {"model": "default", "messages": turns(n), **short}
        ),
        "tokenize, a megabyte": post("/tokenize", lambda n: {"prompt": text(n), "return_token_strs": True}),
        "detokenize": post("/detokenize", lambda n: {"tokens": token_ids(n)}),
        "status, 1,000 requests": get("/v1/status"),
        "metrics": get("/metrics"),
        "DELETE cache, full": clear,
    }
    if embeddings:
        found |= {
            "embeddings, 512 texts": post("/v1/embeddings", lambda n: {"input": words(n, 512)}),
            "embeddings, 512 texts, base64": post(
                "/v1/embeddings", lambda n: {"input": words(n, 512), "encoding_format": "base64"}
            ),
            "embeddings, token ids": post(
                "/v1/embeddings", lambda n: {"input": [token_ids(n + k, 100) for k in range(100)]}
            ),
            "rerank, 512 documents": post(
                "/v1/rerank", lambda n: {"query": "fox", "documents": words(n, 512)}
            ),
        }
    return found


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """For each case, the slowest /health of each of --repeat times, in ms."""
    config = CONFIG | ({"embeddings": {"model": "demo:minilm"}} if args.embeddings else {})
    results: dict[str, list[float]] = {}
    with ServerProcess(config) as server, Pinger(server.url) as pinger:
        client = Client(server.url)
        for name, case in cases(client, embeddings=args.embeddings).items():
            if args.only and args.only not in name:
                continue
            for number in range(args.repeat):
                send = case(number)
                with crowd(server, client, 1000 if name.startswith("status") else 1):
                    pinger.reset()
                    send()
                    time.sleep(0.05)
                    results.setdefault(name, []).append(round(pinger.slowest_ms, 2))
    return results


@contextmanager
def crowd(server: ServerProcess, client: Client, count: int) -> Iterator[None]:
    """So many short requests run or wait meanwhile: the front is not idle, as it seldom is."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    words = [f"hello {number}" for number in range(count)]
    body = orjson.dumps({"prompt": words, "max_tokens": 4096, "ignore_eos": True, "stream": True})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    connection.getresponse().read(1)
    server.wait_until(lambda: len(server.status()["requests"]) >= count, 20.0, "a crowd")
    try:
        yield
    finally:
        connection.close()
        server.wait_idle()


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the median of every case is within the target, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.stalls", description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="times each case is measured")
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--no-embeddings", dest="embeddings", action="store_false")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    results = measure(args)
    table = Table("case", "slowest /health, ms", title="stalls", title_justify="left")
    for name, values in results.items():
        table.add_row(name, " ".join(f"{value:.1f}" for value in values))
    console = Console(width=110)
    console.print(table)
    if args.out is not None:
        flags = {key: value for key, value in vars(args).items() if key != "out"}
        report.write(args.out, report.provenance("stalls", flags=flags, seed=None) | {"result": results})
    worst = max(sorted(values)[len(values) // 2] for values in results.values())
    console.print(f"target {TARGET_MS:.0f} ms: {'met' if worst <= TARGET_MS else 'MISSED'} ({worst:.1f} ms)")
    return 0 if worst <= TARGET_MS else 1


if __name__ == "__main__":
    sys.exit(main())
