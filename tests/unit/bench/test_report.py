"""What a benchmark's result says of the code that it measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.report import commit


def test_the_commit_is_gits_or_what_a_copy_without_git_was_told(tmp_path: Path) -> None:
    assert commit(tmp_path, {}) == "unknown"
    (tmp_path / "COMMIT").write_text("0123456789ab+dirty\n")
    assert commit(tmp_path, {}) == "0123456789ab+dirty"
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    made = ["git", *identity, "commit", "-q", "--allow-empty", "-m", "a"]
    subprocess.run(made, cwd=tmp_path, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert commit(tmp_path, {"MLXD_COMMIT": ""}) == head.stdout[:12]
    assert commit(tmp_path, {"MLXD_COMMIT": "cafe"}) == "cafe"
