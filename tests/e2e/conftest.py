"""Real servers for the end-to-end tests: playback at once, playback at a pace, and SmolLM2.

After every test the servers of the session must be empty: no request, no block, no failed integrity check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from bench.server import ServerProcess
from tests.e2e.sdk import SLOW_RATE

SHARED = ("playback", "slow_playback", "smollm2")


@pytest.fixture(scope="session")
def playback() -> Iterator[ServerProcess]:
    """A server whose worker plays texts at once."""
    with ServerProcess({"worker": {"backend": "playback"}}) as server:
        yield server


@pytest.fixture(scope="session")
def slow_playback() -> Iterator[ServerProcess]:
    """A server that plays SLOW_RATE tokens a second."""
    worker = {"backend": "playback", "playback_tokens_per_second": SLOW_RATE}
    with ServerProcess({"worker": worker}) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2() -> Iterator[ServerProcess]:
    """A server with SmolLM2-135M-Instruct in float32. On two busy cores, an answer of many may take longer
    than the 300 s that are the default."""
    config = {
        "model": {"path": "demo:smollm2"},
        "cache": {"memory_mb": 1024},
        "limits": {"timeout_seconds": 900},
    }
    with ServerProcess(config, ready_seconds=600) as server:
        yield server


@pytest.fixture
def start() -> Iterator[Callable[[dict[str, Any]], ServerProcess]]:
    """Start a server of the test's own; it is stopped at the end of the test."""
    with ExitStack() as stack:
        yield lambda config: stack.enter_context(ServerProcess(config, ready_seconds=600))


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in SHARED:
        if name in request.fixturenames:
            assert_empty(request.getfixturevalue(name))


def assert_empty(server: ServerProcess) -> None:
    """No request runs, and none left blocks behind."""
    status = server.wait_idle()
    assert status["cache"]["used_blocks"] == 0
    assert status["integrity_errors"] == 0
