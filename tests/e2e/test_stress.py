"""bench.stress in small: many clients, a tiny pool and a disk tier, each greedy answer as without a cache."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from bench.stress.__main__ import main


@pytest.mark.timeout(120)
def test_a_short_storm(tmp_path: Path) -> None:
    out = tmp_path / "stress.json"
    assert main(["--conversations", "20", "--weather", "disk", "--out", str(out)]) == 0
    [figures] = orjson.loads(out.read_bytes())["rounds"]
    assert figures["problems"] == [] and figures["compared"] > 20
    assert figures["evicted_blocks"] and figures["cached_tokens"] and figures["disk"]["stored_blocks"]
    assert figures["counts"]["left"] and figures["counts"]["wrong"]
