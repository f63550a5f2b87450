"""Other clients than the official Python SDKs, each a script of its own, where their packages are at hand.

npm install --prefix DIR openai @anthropic-ai/sdk; MLXD_NODE_CLIENTS=DIR pytest tests/e2e/test_clients.py
python -m venv DIR; DIR/bin/pip install langchain-openai litellm instructor anthropic
MLXD_PYTHON_CLIENTS=DIR/bin/python pytest tests/e2e/test_clients.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.server import ServerProcess

SCRIPTS = Path(__file__).parent / "clients"
NODE_CLIENTS = os.environ.get("MLXD_NODE_CLIENTS", "")
PYTHON_CLIENTS = os.environ.get("MLXD_PYTHON_CLIENTS", "")
LIMITED = {"worker": {"backend": "playback"}, "limits": {"rate_limit": 120}}
BUSY = {
    "worker": {"backend": "playback", "playback_tokens_per_second": 200.0},
    "scheduler": {"max_num_seqs": 1, "max_queue": 1},
}


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    """A server that answers at once, one with a rate limit, and one with room for two requests."""
    with ExitStack() as stack:
        configs = ({"worker": {"backend": "playback"}}, LIMITED, BUSY)
        yield [stack.enter_context(ServerProcess(config)).url for config in configs]


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(": ok\n")


@pytest.mark.skipif(not NODE_CLIENTS or not shutil.which("node"), reason="MLXD_NODE_CLIENTS is not set")
@pytest.mark.parametrize("script", ["openai_node.mjs", "anthropic_node.mjs"])
def test_node(urls: list[str], script: str) -> None:
    run("node", str(SCRIPTS / script), NODE_CLIENTS, *urls)


@pytest.mark.skipif(not PYTHON_CLIENTS, reason="MLXD_PYTHON_CLIENTS is not set")
@pytest.mark.parametrize("script", ["with_langchain.py", "with_litellm.py", "with_instructor.py"])
def test_python(urls: list[str], script: str) -> None:
    run(PYTHON_CLIENTS, str(SCRIPTS / script), *urls)
