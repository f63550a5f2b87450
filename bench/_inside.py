"""mlxd's command line with an eye inside: `python -m bench._inside [--probe PATH] [--profile FILE] -- …`.

It is no benchmark, which its name's beginning tells `mlxd bench`; benchmarks' servers run by it.
It does not know what mlxd does. The probe is a Unix socket, served by a thread of its own: whoever
connects gets a JSON object with the number of live objects of each of mlxd's classes and, as
`asyncio.Task`, of unfinished tasks. Nothing is counted before somebody asks.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import socket
import sys
import threading
from collections import Counter

import orjson

from mlxd.cli import main as mlxd_main


def count_objects() -> dict[str, int]:
    """Live objects of mlxd's own classes by `module.Class`, and unfinished tasks."""
    gc.collect()
    counts: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if isinstance(thing, asyncio.Task):
            counts["asyncio.Task"] += not thing.done()
        elif str(kind.__module__).startswith("mlxd."):
            counts[f"{kind.__module__}.{kind.__qualname__}"] += 1
    return dict(counts)


def serve_probe(path: str) -> None:
    """Answer on a Unix socket at `path`, for as long as the process lives."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()

    def answer() -> None:
        while True:
            with listener.accept()[0] as connection:
                connection.sendall(orjson.dumps(count_objects()))

    threading.Thread(target=answer, name="probe", daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench._inside")
    parser.add_argument("--probe")
    parser.add_argument("--profile")
    parser.add_argument("arguments", nargs="*", help="mlxd's own, after --")
    args = parser.parse_args()
    if args.probe:
        serve_probe(args.probe)
    if not args.profile:
        return mlxd_main(args.arguments)
    profile = cProfile.Profile()
    try:
        return profile.runcall(mlxd_main, args.arguments)
    finally:
        profile.dump_stats(args.profile)


if __name__ == "__main__":
    sys.exit(main())
