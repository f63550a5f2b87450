"""bench.compare against mlxd itself, twice: what it starts, asks, counts and writes."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench.compare.__main__ import main, run_server
from bench.compare.contenders import CONTENDERS, Contender
from bench.compare.table import markdown
from bench.compare.workloads import scenarios

PLAYBACK = Contender(
    "playback",
    "mlxd",
    "mlxd",
    lambda model, port, n: [
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--set",
        "worker.backend=playback",
    ],
    "/health/ready",
)


def test_a_server_is_started_asked_and_stopped(tmp_path: Path) -> None:
    plan = scenarios(clients=[1, 2], output_tokens=4, requests_per_client=2, rate=50.0, seed=7)
    args = argparse.Namespace(model=tmp_path, timeout=20.0)
    console = Console(file=io.StringIO(), width=200)
    found = run_server(PLAYBACK, Path(sys.executable), args, plan, console)
    assert list(found["scenarios"]) == [scenario.name for scenario in plan]
    for scenario in plan:
        figures = found["scenarios"][scenario.name]
        assert figures["ok"] == figures["requests"] == scenario.num_requests
        assert figures["output_tokens"] >= scenario.num_requests
        assert figures["errors"] == {}
    assert found["versions"]["mlxd"] and found["peak_rss_bytes"] > 10_000_000
    head = {"date": "2026-01-01", "machine": {"cpu": "c", "cores": 2}, "commit": "x", "seed": 7}
    table = markdown(head | {"result": {"playback": found, "other": {"failed": "no such thing"}}})
    assert "- other: failed: no such thing" in table
    assert table.count("| playback |") == len(plan)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    broken = Contender("broken", "mlxd", "mlxd", lambda model, port, n: ["serve", "--no-such-flag"])
    with pytest.raises(RuntimeError, match="it exited"):
        run_server(broken, Path(sys.executable), argparse.Namespace(model=tmp_path), [], Console())


def test_unknown_servers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "x", "--servers", "vllm-mlx"])
    assert "needs --other vllm-mlx=VENV" in capsys.readouterr().err
    assert set(CONTENDERS) == {"mlxd", "mlx-lm", "vllm-mlx"}
