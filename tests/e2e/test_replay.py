"""bench.replay: an agent's session computes hardly more than what is new in each turn."""

from __future__ import annotations

from pathlib import Path

import orjson

from bench.replay import main
from bench.server import ServerProcess


def test_a_session_is_computed_once(playback: ServerProcess, tmp_path: Path) -> None:
    out = tmp_path / "replay.json"
    arguments = ["--url", playback.url, "--turns", "6", "--system-tokens", "2400", "--final-tokens", "3000"]
    assert main([*arguments, "--out", str(out)]) == 0
    result = orjson.loads(out.read_bytes())["result"]
    assert result["turns"] == 6 and result["prompt_tokens"] > 5 * 2400
    # Tokens that words share with their neighbours make a few of difference.
    assert 0.95 < result["computed_tokens"] / result["least_tokens"] < 1.1
    assert 2900 < result["last_prompt_tokens"] < 3100


def test_a_server_that_refuses_ends_it(playback: ServerProcess) -> None:
    assert main(["--url", playback.url, "--model", "no-such-model"]) == 1
