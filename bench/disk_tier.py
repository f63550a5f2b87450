"""What the disk tier is worth, and what it costs running streams: `python -m bench.disk_tier`.

It does not know the server's code. In one run: the time to the first token of a long prompt computed, and
read back after kill -9; and the gaps between tokens of streams that run alone, while another long prompt is
computed (and written out, or without a disk tier), and while the first is read back. The pool holds no more
than one long prompt beside the streams, so that memory forgets.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from itertools import pairwise
from typing import Any

import orjson

from bench.report import provenance
from bench.serve.http import Address
from bench.server import ServerProcess


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.disk_tier", description=__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--stream-tokens", type=int, default=60)
    parser.add_argument("--vocabulary", type=int, default=40000, help="prompts are random tokens below this")
    parser.add_argument("--folder", help="where blocks go; by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, arguments.folder or temporary)
    head = provenance("disk_tier", flags=vars(arguments), seed=0)
    print(orjson.dumps(head | result, option=orjson.OPT_INDENT_2).decode())


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    rng = random.Random(0)
    prompt, other = (
        [rng.randrange(100, arguments.vocabulary) for _ in range(arguments.prompt_tokens)] for _ in range(2)
    )
    streams = arguments.streams * (arguments.stream_tokens + 32)
    config: dict[str, Any] = {
        "model": {"path": arguments.model},
        "cache": {"num_blocks": (arguments.prompt_tokens + streams) // 16 + 16, "disk_path": folder},
        "server": {"access_log": False},
    }
    no_disk = config | {"cache": {"num_blocks": config["cache"]["num_blocks"]}}
    with ServerProcess(no_disk, ready_seconds=600) as server:
        without_disk = run_streams(server, arguments, other)
    with ServerProcess(config, ready_seconds=600) as server:
        computed = time_first_token(server, prompt)
        seconds_to_store = wait_stored(server)
        in_memory = time_first_token(server, prompt)
        # Both of these begin with streams that run alone for a while.
        while_computing = run_streams(server, arguments, other)
        wait_stored(server)
        while_reading = run_streams(server, arguments, prompt)
        restored_once = disk(server)["restored_tokens"]
        pid = server.worker_pid()
        os.kill(pid, signal.SIGKILL)
        server.wait_until(lambda: server.status()["worker"]["pid"] != pid, 60.0, "a new worker")
        server.wait_ready(600)
        server.wait_until(lambda: disk(server).get("complete", False), 60.0, "the scan")
        time_first_token(server, prompt[:4])  # what a new worker does once
        from_disk = time_first_token(server, prompt)
        status = disk(server)
    return {
        "ttft_computed_s": computed,
        "ttft_from_memory_s": in_memory,
        "ttft_from_disk_s": from_disk,
        "stored_after_the_answer_s": seconds_to_store,
        "itl_while_another_is_computed": without_disk,
        "itl_while_another_is_computed_and_stored": while_computing,
        "itl_while_another_is_read_back": while_reading,
        "restored_tokens": {
            "beside_streams": restored_once,
            "after_kill": status["restored_tokens"] - restored_once,
        },
        "disk": status,
    }


def disk(server: ServerProcess) -> dict[str, Any]:
    found: dict[str, Any] = server.status()["cache"].get("disk", {})
    return found


def wait_stored(server: ServerProcess) -> float:
    """Until the disk has everything; seconds."""
    began = time.perf_counter()
    server.wait_idle(60)
    server.wait_until(lambda: disk(server)["storing_blocks"] == 0, 60.0, "the disk")
    return time.perf_counter() - began


def stream(server: ServerProcess, prompt: list[int], max_tokens: int) -> list[float]:
    """When each token came, seconds; the first entry is when the request was sent."""
    address = Address.parse(server.url)
    connection = http.client.HTTPConnection(address.host, address.port or None, timeout=300)
    body = {
        "model": "default",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    times = [time.perf_counter()]
    connection.request("POST", "/v1/completions", orjson.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    times += (time.perf_counter() for line in response if line.startswith(b"data: {"))
    connection.close()
    return times


def time_first_token(server: ServerProcess, prompt: list[int]) -> float:
    times = stream(server, prompt, 1)
    server.wait_idle(60)
    return times[1] - times[0]


def run_streams(server: ServerProcess, arguments: argparse.Namespace, prompt: list[int]) -> dict[str, Any]:
    """Gaps between the streams' tokens, ms, until `prompt` is sent, and then until its first token."""
    lines: list[list[float]] = []
    threads = [
        threading.Thread(
            target=lambda n=n: lines.append(stream(server, [n + 200] * 16, arguments.stream_tokens))
        )
        for n in range(arguments.streams)
    ]
    for thread in threads:
        thread.start()
    server.wait_until(
        lambda: any(
            request["generated_tokens"] > arguments.stream_tokens // 3
            for request in server.status()["requests"]
        ),
        120.0,
        "the streams",
    )
    sent, *came = stream(server, prompt, 1)
    for thread in threads:
        thread.join()
    alone, beside = [], []
    for times in lines:
        for before, after in pairwise(times[1:]):
            if after <= sent:
                alone.append(after - before)
            elif before < came[0]:
                beside.append(after - before)
    return {"ttft_s": came[0] - sent, "alone_ms": describe(alone), "beside_ms": describe(beside)}


def describe(gaps: list[float]) -> dict[str, float]:
    if not gaps:
        return {"count": 0}
    ordered = sorted(gaps)
    return {
        "count": len(gaps),
        "p50": round(statistics.median(ordered) * 1e3, 1),
        "p95": round(ordered[int(len(ordered) * 0.95)] * 1e3, 1),
        "max": round(ordered[-1] * 1e3, 1),
    }


if __name__ == "__main__":
    main()
