"""The prefix cache on disk: a prompt that was computed once is a hit after kill -9, and never a wrong one."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.server import ServerProcess
from tests.e2e.sdk import connect, played, user

Start = Callable[[dict[str, Any]], ServerProcess]
TEXT = " ".join(f"the {n}th of many words," for n in range(60))
BLOCK_SIZE = 16


def disk_status(server: ServerProcess) -> dict[str, Any]:
    disk: dict[str, Any] = server.status()["cache"]["disk"]
    return disk


def wait_stored(server: ServerProcess) -> None:
    server.wait_idle()
    server.wait_until(lambda: disk_status(server)["storing_blocks"] == 0, 20.0, "the disk")


def wait_scanned(server: ServerProcess) -> None:
    server.wait_until(lambda: server.status()["cache"].get("disk", {}).get("complete"), 60.0, "the scan")


def ask(server: ServerProcess, messages: Any, max_tokens: int = 4000) -> tuple[str | None, int, int]:
    """The answer, the prompt's tokens, and those of them that were cached."""
    with connect(server) as client:
        answer = client.chat.completions.create(
            model="default", messages=messages, temperature=0, max_tokens=max_tokens
        )
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    return (
        answer.choices[0].message.content,
        usage.prompt_tokens,
        usage.prompt_tokens_details.cached_tokens or 0,
    )


def whole_blocks(num_tokens: int) -> int:
    """What can come back of a prompt: whole blocks, and not the last token."""
    return (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


def kill_worker(server: ServerProcess) -> None:
    pid = server.worker_pid()
    os.kill(pid, signal.SIGKILL)
    server.wait_until(lambda: server.status()["worker"]["pid"] != pid, 20.0, "a new worker")
    server.wait_ready(120.0)
    wait_scanned(server)


def kill_server(server: ServerProcess) -> None:
    server.process.kill()
    server.process.wait(10)


def test_a_prompt_is_a_hit_after_the_worker_and_then_the_server_were_killed(
    start: Start, tmp_path: Path
) -> None:
    config = {"worker": {"backend": "playback"}, "cache": {"disk_path": str(tmp_path / "kv")}}
    server = start(config)
    text, num_tokens, cached = ask(server, user(played(TEXT)))
    assert (text, cached) == (TEXT, 0)
    wait_stored(server)
    kill_worker(server)
    assert ask(server, user(played(TEXT))) == (TEXT, num_tokens, whole_blocks(num_tokens))
    disk = disk_status(server)
    assert disk["restored_tokens"] == whole_blocks(num_tokens) and disk["errors"] == {}
    wait_stored(server)
    kill_server(server)
    again = start(config)
    wait_scanned(again)
    assert ask(again, user(played(TEXT))) == (TEXT, num_tokens, whole_blocks(num_tokens))
    # In memory now, to the token.
    assert ask(again, user(played(TEXT)))[2] == num_tokens - 1


def test_damaged_files_change_no_answer_and_are_counted(start: Start, tmp_path: Path) -> None:
    config = {"worker": {"backend": "playback"}, "cache": {"disk_path": str(tmp_path / "kv")}}
    server = start(config)
    rng = random.Random(0)
    texts = [f"{number} {TEXT}" for number in range(6)]
    for text in texts:
        assert ask(server, user(played(text)))[0] == text
    wait_stored(server)
    num_blocks = disk_status(server)["blocks"]
    kill_worker(server)
    files = sorted(tmp_path.rglob("*.kv"))
    assert len(files) == num_blocks
    for file in rng.sample(files, num_blocks // 4):
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data[: len(data) - rng.randrange(2)])
    for text in texts:
        assert ask(server, user(played(text)))[0] == text
    errors = disk_status(server)["errors"]
    assert errors and errors.keys() <= {"damaged", "truncated"}
    assert 0 < disk_status(server)["restored_tokens"] < num_blocks * BLOCK_SIZE
    assert server.status()["integrity_errors"] == 0


def test_a_folder_in_use_is_a_warning_and_metrics_tell_the_rest(start: Start, tmp_path: Path) -> None:
    config = {
        "worker": {"backend": "playback"},
        "server": {"metrics": True},
        "cache": {"disk_path": str(tmp_path)},
    }
    first = start(config)
    ask(first, user(played(TEXT)))
    wait_stored(first)
    page = first.get("/metrics")[1].decode()
    assert f"mlxd_disk_cache_blocks {disk_status(first)['blocks']}.0\n" in page
    second = start(config)
    assert ask(second, user(played("without a disk")))[0] == "without a disk"
    status = second.status()
    assert "disk" not in status["cache"]
    assert status["worker"]["warnings"] == [
        "the prefix cache has no disk tier: cache.disk_path is in use by another server"
    ]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_smollm2_after_kill_9(start: Start, tmp_path: Path) -> None:
    config = {
        "model": {"path": "demo:smollm2"},
        "cache": {"memory_mb": 512, "disk_path": str(tmp_path)},
        "worker": {"warmup": False},
    }
    messages = user("Say in one word what these are: " + TEXT[:400])
    server = start(config)
    text, num_tokens, _ = ask(server, messages, 8)
    wait_stored(server)
    kill_server(server)
    server = start(config)
    wait_scanned(server)
    assert ask(server, messages, 8) == (text, num_tokens, whole_blocks(num_tokens))
