"""What load balancers and operators are told: health by the heartbeat, status by the guide's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxd.step import Heartbeat, WorkerFailure
from tests.unit.api.stack import Stack, play

GUIDE_STATUS: dict[str, Any] = {
    "status": str,
    "model": str,
    "uptime_s": float,
    "steps_executed": int,
    "num_running": int,
    "num_waiting": int,
    "total_requests_processed": int,
    "total_prompt_tokens": int,
    "total_completion_tokens": int,
    "metal": {"active_memory_gb": float, "peak_memory_gb": float, "cache_memory_gb": float},
    "cache": {"type": str, "entries": int, "hit_rate": float, "memory_mb": float},
    "requests": list,
}
GUIDE_REQUEST: dict[str, Any] = {
    "request_id": str,
    "phase": str,
    "tokens_per_second": float,
    "ttft_s": float,
    "progress": float,
    "cache_hit_type": str,
    "cached_tokens": int,
    "generated_tokens": int,
    "max_tokens": int,
    # Beyond the guide:
    "prompt_tokens": int,
    "queue_s": float,
    "elapsed_s": float,
    "completion_tokens": int,
}


def check(value: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, kind in expected.items():
        if isinstance(kind, dict):
            check(value[name], kind)
        else:
            assert isinstance(value[name], kind), f"{name}: {value[name]!r}"


async def get(stack: Stack, path: str) -> tuple[int, dict[str, Any]]:
    response = await stack.ask("GET", path)
    return response.status, json.loads(response.body)


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_an_old_heartbeat_is_503(model_folder: Path, path: str) -> None:
    async def scenario(stack: Stack) -> None:
        stack.time += 29.0
        assert (await get(stack, path))[0] == 200
        stack.time += 2.0
        status, body = await get(stack, path)
        assert status == 503
        assert body == {"status": "unhealthy", "reason": "no heartbeat from the worker for 31 s"}
        stack.worker.on_message(Heartbeat(1, 0.0))
        assert await get(stack, path) == (200, {"status": "healthy", "model": "org/model"})

    play(scenario, model_folder, {"model": {"path": "org/model"}})


def test_memory_is_known_before_the_first_step(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        for active, peak in ((2_000_000_000, 2.0), (1_000_000_000, 2.0), (0, 2.0)):
            stack.worker.on_message(Heartbeat(0, 0.0, active))
            metal = (await get(stack, "/v1/status"))[1]["metal"]
            assert (metal["active_memory_gb"], metal["peak_memory_gb"]) == (active / 1e9 or 1.0, peak)

    play(scenario, model_folder)


def test_status_says_which_cache_it_is(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        assert (await get(stack, "/v1/status"))[1]["cache"]["type"] == "contiguous_cache"

    play(scenario, model_folder, {"cache": {"paged": False}})


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_a_worker_that_beats_but_hangs_in_a_step_is_503(model_folder: Path, path: str) -> None:
    async def scenario(stack: Stack) -> None:
        stack.worker.on_message(Heartbeat(1, 31.0))
        status, body = await get(stack, path)
        assert (status, body["reason"]) == (503, "one step has been running for 31 s")

    play(scenario, model_folder)


def test_a_dead_worker_is_503_until_the_next_one_is_there(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxd.engine.supervisor.RESTART_DELAYS_SECONDS", (0.05,))

    async def scenario(stack: Stack) -> None:
        stack.worker.die()
        await stack.until(lambda: not stack.is_ready())
        for path in ("/health", "/health/ready"):
            status, body = await get(stack, path)
            assert (status, "restarting" in body["reason"]) == (503, True)
        assert (await get(stack, "/v1/status"))[1]["status"] == "not_loaded"
        await stack.until(stack.is_ready)
        assert (await get(stack, "/health"))[0] == 200

    play(scenario, model_folder)


def test_status_has_the_guides_names_and_types(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        client = stack.connect()
        ask = {"prompt": [3, 4, 5], "max_tokens": 100, "ignore_eos": True, "stream": True, "n": 2}
        await client.send("POST", "/v1/completions", ask)
        await stack.until(lambda: b"data:" in client.output)
        stack.worker.hold = True
        stack.time += 2.0
        _, status = await get(stack, "/v1/status")
        check(status, GUIDE_STATUS)
        assert (status["status"], status["num_running"], status["uptime_s"]) == ("running", 1, 2.0)
        for request in status["requests"]:
            phase = request["phase"]
            assert phase in ("queued", "prefill", "generation")
            unknown = {"ttft_s": type(None), "cache_hit_type": (str, type(None))}
            check(request, GUIDE_REQUEST if phase == "generation" else GUIDE_REQUEST | unknown)
        assert [r["phase"] for r in status["requests"]] == ["generation", "queued"]
        assert 0 < status["requests"][0]["progress"] < 1
        await client.lose()
        stack.worker.release_held()

    play(scenario, model_folder, {"model": {"path": "org/model"}, "scheduler": {"max_num_seqs": 1}})


def test_status_counts_what_happened(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        ask = {"prompt": [3, 4, 5], "max_tokens": 7, "ignore_eos": True}
        for _ in range(2):
            assert (await stack.ask("POST", "/v1/completions", ask)).status == 200
        _, status = await get(stack, "/v1/status")
        assert (status["total_requests_processed"], status["total_prompt_tokens"]) == (2, 6)
        assert (status["total_completion_tokens"], status["requests"]) == (14, [])
        assert status["steps_executed"] >= 14
        # Two of the second prompt's three tokens were there.
        assert status["cache"]["hit_rate"] == pytest.approx(2 / 6, abs=1e-4)

    play(scenario, model_folder)


def test_a_request_goes_through_the_guides_phases(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        async def requests() -> list[dict[str, Any]]:
            return list((await get(stack, "/v1/status"))[1]["requests"])

        stack.worker.hold = True
        client, other = stack.connect(), stack.connect()
        ask = {"prompt": list(range(2, 42)), "max_tokens": 50, "ignore_eos": True, "stream": True}
        await client.send("POST", "/v1/completions", ask)
        await other.send("POST", "/v1/completions", {**ask, "prompt": [3]})
        assert [request["phase"] for request in await requests()] == ["prefill", "queued"]
        stack.time += 0.5
        stack.worker.release_held()
        await stack.until(lambda: b'"text":"' in client.output)
        stack.worker.hold = True
        stack.time += 2.0
        running, queued = await requests()
        assert (running["phase"], running["ttft_s"]) == ("generation", 0.5)
        num_tokens = running["generated_tokens"]
        assert running["tokens_per_second"] == round((num_tokens - 1) / 2.0, 2)
        assert running["progress"] == num_tokens / 50 and running["max_tokens"] == 50
        assert (running["cache_hit_type"], running["cached_tokens"]) == ("miss", 0)
        assert (queued["phase"], queued["queue_s"]) == ("queued", 2.5)
        for connection in (client, other):
            await connection.lose()
        stack.worker.release_held()

    play(scenario, model_folder, {"scheduler": {"max_num_seqs": 1, "max_num_batched_tokens": 16}})


def test_a_worker_that_cannot_start_is_stopped(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        stack.worker.on_message(WorkerFailure("no such model", fatal=True))
        stack.worker.die()
        await stack.until(lambda: bool(stack.failures))
        assert (await get(stack, "/v1/status"))[1]["status"] == "stopped"

    play(scenario, model_folder)
