"""The Python of the README and of docs/integrations.md, run as it stands against a real server."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from bench.report import ROOT
from bench.server import ServerProcess

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(code, id=f"{page}-{n}")
    for page in ("README.md", "docs/integrations.md")
    for n, code in enumerate(BLOCK.findall((ROOT / page).read_text()), 1)
]


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs(playback: ServerProcess, code: str) -> None:
    assert "http://127.0.0.1:8000" in code
    code = code.replace("http://127.0.0.1:8000", playback.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "This is the playback worker" in done.stdout
