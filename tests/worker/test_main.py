"""The worker as a real process: loads, serves steps, and ends as it should in every way it can end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import msgspec
import pytest

from mlxd.config import CacheConfig, Config, ModelConfig, SchedulerConfig, WorkerConfig
from mlxd.errors import ConfigError, WorkerError
from mlxd.step import (
    Flush,
    FromWorker,
    ModelFiles,
    Progress,
    Shutdown,
    StepResult,
    ToWorker,
    WorkerFailure,
    WorkerInit,
    WorkerReady,
)
from mlxd.worker.channel import Channel
from mlxd.worker.main import failure, read_init
from tests.worker.model_folders import greedy, write_llama
from tests.worker.worker_plans import Row, slot_init, step_plan, tokens_of
from tests.worker.worker_process import TIMEOUT_SECONDS, Worker, worker_process

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model folder, and the model in it."""

    folder: Path
    model: nn.Module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    return Tiny(folder, write_llama(folder))


def config(path: Path | str, **worker: object) -> Config:
    return Config(
        model=ModelConfig(path=str(path)),
        cache=CacheConfig(num_blocks=40, block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(max_num_seqs=4),
        worker=WorkerConfig(warmup=False, **worker),  # type: ignore[arg-type]
    )


def generate(worker: Worker, prompt: list[int], count: int) -> list[int]:
    """One greedy request in slot 0, a plan always in flight."""
    blocks = list(range(1, 2 + (len(prompt) + count) // BLOCK_SIZE))
    first = Row(0, blocks, len(prompt), prompt)
    worker.channel.send(step_plan(1, [first], BLOCK_SIZE, admit=[slot_init(0, len(prompt))]))
    output: list[int] = []
    for step_id in range(2, count + 1):
        row = Row(0, blocks, len(prompt) + step_id - 1)
        worker.channel.send(step_plan(step_id, [row], BLOCK_SIZE))
        output += tokens_of(worker.receive(StepResult).token_ids)
    worker.channel.send(Flush())
    return output + tokens_of(worker.receive(StepResult).token_ids)


def test_a_whole_life(tiny: Tiny, tmp_path: Path) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]
    with worker_process(config(tiny.folder), tmp_path) as worker:
        ready = worker.receive(WorkerReady)
        assert ready.pid == worker.process.pid
        assert (ready.model_type, ready.vocab_size, ready.block_size) == ("llama", 320, BLOCK_SIZE)
        assert (ready.num_blocks, ready.max_model_len) == (40, 512)
        assert (ready.dtype, ready.device[:5]) == ("float32", "cpu (")
        assert ready.memory.kv_pool_bytes == 40 * BLOCK_SIZE * ready.memory.kv_bytes_per_token
        assert ready.warnings == ()
        assert ModelFiles(str(tiny.folder.resolve())) in worker.seen
        stages = [message.stage for message in worker.seen if isinstance(message, Progress)]
        assert sorted(set(stages), key=stages.index) == ["resolve", "load", "warmup"]
        assert generate(worker, prompt, 12) == greedy(tiny.model, prompt, 12)
        # SIGINT is the front's business.
        worker.process.send_signal(signal.SIGINT)
        assert generate(worker, prompt[:3], 3) == greedy(tiny.model, prompt[:3], 3)
        assert worker.shut_down() == 0


def test_results_in_flight_come_before_the_end(tiny: Tiny, tmp_path: Path) -> None:
    with worker_process(config(tiny.folder), tmp_path) as worker:
        worker.receive(WorkerReady)
        plan = step_plan(1, [Row(0, [1], 3, [7, 8, 9])], BLOCK_SIZE, admit=[slot_init(0, 3)])
        worker.channel.send(plan)
        worker.channel.send(Shutdown())
        result = worker.receive(StepResult)
        assert tokens_of(result.token_ids) == greedy(tiny.model, [7, 8, 9], 1)
        assert result.step_seconds > 0 and result.active_memory_bytes > 0
        assert worker.process.wait(TIMEOUT_SECONDS) == 0


def test_contiguous_caches_serve_too(tiny: Tiny, tmp_path: Path) -> None:
    options = msgspec.structs.replace(
        config(tiny.folder), cache=CacheConfig(num_blocks=40, block_size=BLOCK_SIZE, paged=False)
    )
    with worker_process(options, tmp_path) as worker:
        assert worker.receive(WorkerReady).attention == "mlx-lm"
        assert generate(worker, [5, 6, 7], 4) == greedy(tiny.model, [5, 6, 7], 4)


def playing(path: str | None = None) -> Config:
    return Config(model=ModelConfig(path=path), worker=WorkerConfig(backend="playback"))


def test_it_ends_when_the_front_is_gone(tmp_path: Path) -> None:
    with worker_process(playing(), tmp_path) as worker:
        worker.receive(WorkerReady)
        worker.channel.close()
        assert worker.process.wait(TIMEOUT_SECONDS) == 1


def test_sigterm_is_a_clean_end(tmp_path: Path) -> None:
    with worker_process(playing(), tmp_path) as worker:
        worker.receive(WorkerReady)
        worker.process.terminate()
        assert worker.process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the heartbeat notices")
def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """Even when somebody else still holds the front's end of the socket."""
    code = (
        "import os, socket, subprocess, sys\n"
        "theirs = socket.socket(fileno=int(sys.argv[1]))\n"
        "worker = subprocess.Popen([sys.executable, '-m', 'mlxd.worker.main', '--fd', sys.argv[1]],"
        " pass_fds=[theirs.fileno()])\n"
        "print(worker.pid, flush=True)\n"
        "sys.stdin.read()\n"
        "os._exit(0)\n"
    )
    ours, theirs = socket.socketpair()
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "MLXD_CACHE": str(tmp_path)},
    )
    theirs.close()
    ours.settimeout(TIMEOUT_SECONDS)
    channel: Channel[FromWorker] = Channel(ours, FromWorker)  # type: ignore[arg-type]
    channel.send(WorkerInit(msgspec.to_builtins(playing())))
    assert parent.stdin is not None and parent.stdout is not None
    pid = int(parent.stdout.readline())
    while not isinstance(channel.receive(), WorkerReady):
        pass
    parent.stdin.close()
    parent.wait(TIMEOUT_SECONDS)
    with pytest.raises(EOFError):  # the worker's end is closed only when the worker is gone
        while True:
            channel.receive()
    assert not Path(f"/proc/{pid}/fd").exists() or not os.listdir(f"/proc/{pid}/fd")
    parent.stdout.close()
    channel.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "hal9000"}, "'hal9000'"),
        ({"model_type": "mamba"}, "cannot be loaded"),
        ({"max_position_embeddings": None}, "model.max_model_len"),
    ],
)
def test_what_no_retry_can_mend_is_fatal(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    folder = tmp_path / "model"
    write_llama(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with worker_process(config(folder), tmp_path) as worker:
        message = worker.receive(WorkerFailure)
        assert message.fatal and reason in message.message
        assert worker.process.wait(TIMEOUT_SECONDS) == 1


def test_a_folder_that_is_not_there_is_fatal(tmp_path: Path) -> None:
    with worker_process(config("/no/such/model"), tmp_path) as worker:
        message = worker.receive(WorkerFailure)
        assert message.fatal and "no such file or folder" in message.message
        assert worker.process.wait(TIMEOUT_SECONDS) == 1


def test_a_pool_that_does_not_fit_says_the_numbers(tiny: Tiny, tmp_path: Path) -> None:
    options = msgspec.structs.replace(config(tiny.folder), cache=CacheConfig(num_blocks=1 << 31))
    with worker_process(options, tmp_path) as worker:
        message = worker.receive(WorkerFailure)
        assert message.fatal and "num_blocks 2147483648 takes" in message.message


def test_a_step_that_raises_ends_the_worker_but_not_for_good(tmp_path: Path) -> None:
    with worker_process(playing(), tmp_path) as worker:
        worker.receive(WorkerReady)
        plan = step_plan(1, [Row(0, [1], 1, [7])], 16, admit=[slot_init(100_000, 1)])
        worker.channel.send(plan)
        message = worker.receive(WorkerFailure)
        assert message == WorkerFailure("the worker failed while running a step (IndexError)", fatal=False)
        assert worker.process.wait(TIMEOUT_SECONDS) == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Flush(), "protocol"),
        (WorkerInit({}, protocol_version=99), "protocol"),
        (WorkerInit({"model": {"size": "huge"}}), "`size`"),
    ],
)
def test_a_front_of_another_version_is_told(message: ToWorker, reason: str) -> None:
    with pytest.raises(WorkerError, match=reason):
        read_init(message)


def test_a_message_out_of_place_ends_the_worker(tmp_path: Path) -> None:
    with worker_process(playing(), tmp_path) as worker:
        worker.receive(WorkerReady)
        worker.channel.send(WorkerInit({}))
        assert "ProtocolError" in worker.receive(WorkerFailure).message


@pytest.mark.parametrize(
    ("error", "loading", "expected"),
    [
        (ConfigError("no such model"), True, WorkerFailure("no such model", fatal=True)),
        (WorkerError("the hub is away"), True, WorkerFailure("the hub is away", fatal=False)),
        (
            RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"),
            False,
            WorkerFailure("the device ran out of memory while running a step", fatal=False),
        ),
        (
            ValueError("/secret/path"),
            True,
            WorkerFailure("the worker failed while loading the model (ValueError)", fatal=False),
        ),
    ],
)
def test_last_words(error: Exception, loading: bool, expected: WorkerFailure) -> None:
    assert failure(error, loading) == expected


def test_the_plan_tool_agrees_with_the_worker(tiny: Tiny) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlxd.worker.plan"],
        input=msgspec.json.encode(config(tiny.folder)),
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=True,
    )
    facts = json.loads(done.stdout)
    assert (facts["num_blocks"], facts["max_model_len"], facts["dtype"]) == (40, 512, "float32")
    done = subprocess.run(
        [sys.executable, "-m", "mlxd.worker.plan"],
        input=msgspec.json.encode(config("/no/such/model")),
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=True,
    )
    facts = json.loads(done.stdout)
    assert facts["fatal"] is True and "no such file or folder" in facts["error"]
