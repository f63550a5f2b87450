"""Nothing that the compiled modules allocate outlives its owner. Each check has a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Calls of every kind, those that raise included.
EXERCISE = """
from array import array


def refuse(call, *arguments):
    try:
        call(*arguments)
    except (TypeError, ValueError, AssertionError):
        return
    raise SystemExit(f"{call} took {arguments}")


def exercise():
    refuse(block_table.BlockPool, 1, 1)
    refuse(block_table.BlockPool, "8", 4)
    pool = block_table.BlockPool(64, 4)
    refuse(block_table.BlockTables, pool, 0, 1)
    refuse(block_table.BlockTables, None, 1, 1)
    tables = block_table.BlockTables(pool, 8, 8)
    slots, lens = array("i", range(8)), array("i", [9] * 8)
    assert tables.reserve_rows(slots, lens) == 8
    refuse(tables.reserve_rows, slots, array("q", lens))
    refuse(tables.fill, slots, lens, slots)
    tables.fill(slots, lens, lens)
    tables.release(7)
    tables.share(7, tables.block_ids(0))
    refuse(tables.share, 7, [0])
    held = pool.allocate(2)
    tables.replace(7, 0, held.pop())
    refuse(pool.decref, [held[0], held[0]])
    refuse(tables.check_integrity, {"x": 1})
    refuse(tables.check_integrity, {99: 1})
    refuse(tables.check_integrity)
    tables.check_integrity({held[0]: 1})
    refuse(prefix_index.PrefixIndex, None)
    refuse(hashed_tokens.HashedTokens, 4, b"short")
    index = prefix_index.PrefixIndex(tables)
    tokens = hashed_tokens.HashedTokens(4, b"-" * 16)
    tokens.extend(list(range(9)))
    refuse(tokens.extend, [-1])
    refuse(tokens.extend, ["x"])
    tokens.digest(9)
    tokens.common_blocks(tokens)
    for slot in range(8):
        index.release(slot, tokens, 9 if slot < 2 else 0)
    path, nearest, num_common = index.match(tokens, 9)
    assert (len(path), num_common) == (2, 1)
    refuse(index.share, 0, path[::-1])
    index.share(0, path)
    assert index.adopt(0, nearest, 1)
    index.hold(path)
    refuse(index.hold, [path[1], "x"])
    index.check_integrity({**dict.fromkeys(path, 1), held[0]: 1})
    refuse(index.check_integrity)
    index.discard(0)
    index.release(0, tokens, 9)
    index.unhold(path)
    index.evict(64)
    refuse(sse.TextFrame, None, b"")
    refuse(sse.TextFrame, b"", b"\\n")
    text_frame = sse.TextFrame(b"{", b"}")
    for delta in ("text", "\\n\\ud800é😀"):
        text_frame.encode(delta)
        sse.event_frame(delta[:1].strip() or "x", sse.frame(sse.escape_json(delta))[:-2])
"""

MEASURE = """
import gc
import tracemalloc
from mlxd._ext import block_table, hashed_tokens, prefix_index, sse

exec(EXERCISE)
for _ in range(20):
    exercise()
gc.collect()
tracemalloc.start()
exercise()
gc.collect()
before = tracemalloc.get_traced_memory()[0]
for _ in range(200):
    exercise()
gc.collect()
grown = tracemalloc.get_traced_memory()[0] - before
# One leaked object a round would be more than 200 * 32 bytes.
assert grown < 2000, f"{grown} bytes more after 200 rounds"
"""

COUNT = """
import gc
import importlib.util
import sys


def load(name):
    (path,) = pathlib.Path(FOLDER).glob(f"mlxd/_ext/{name}.*.so")
    spec = importlib.util.spec_from_file_location(f"mlxd._ext.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# prefix_index imports the other two: they must be these, not those of the checkout.
for name in ("block_table", "hashed_tokens", "prefix_index", "sse"):
    sys.modules[f"mlxd._ext.{name}"] = globals()[name] = load(name)
exec(EXERCISE)
pool = block_table.BlockPool(4, 4)
tables = [block_table.BlockTables(pool, 1, 1) for _ in range(2)]
text_frame = sse.TextFrame(b"", b"")
index = prefix_index.PrefixIndex(tables[0])
tokens = hashed_tokens.HashedTokens(4, b"-" * 16)
assert block_table.live_objects() == {"BlockPool": 1, "BlockTables": 2}, block_table.live_objects()
assert prefix_index.live_objects() == {"PrefixIndex": 1}, prefix_index.live_objects()
assert hashed_tokens.live_objects() == {"HashedTokens": 1}, hashed_tokens.live_objects()
assert sse.live_objects() == {"TextFrame": 1}, sse.live_objects()
del pool, tables, text_frame, index, tokens
for _ in range(100):
    exercise()
gc.collect()
assert block_table.live_objects() == {"BlockPool": 0, "BlockTables": 0}, block_table.live_objects()
assert prefix_index.live_objects() == {"PrefixIndex": 0}, prefix_index.live_objects()
assert hashed_tokens.live_objects() == {"HashedTokens": 0}, hashed_tokens.live_objects()
assert sse.live_objects() == {"TextFrame": 0}, sse.live_objects()
"""


def run(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_traced_memory_does_not_grow() -> None:
    run("-c", f"EXERCISE = {EXERCISE!r}\n{MEASURE}")


@pytest.mark.slow
def test_a_debug_build_counts_no_live_objects(tmp_path: Path) -> None:
    """Builds with assertions, and with every warning an error, beside the modules in use."""
    run(
        *("setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/temp"),
        MLXD_DEBUG="1",
        MLXD_STRICT="1",
    )
    run("-c", f"import pathlib\nEXERCISE = {EXERCISE!r}\nFOLDER = {str(tmp_path)!r}\n{COUNT}")
