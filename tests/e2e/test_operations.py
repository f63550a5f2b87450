"""Keys, limits, overload, metrics and access lines of a real server, as clients and operators meet them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from bench.fairness import main as fairness_bench
from bench.soak import main as soak_bench
from tests.e2e.sdk import connect, played, user

KEYS = [{"name": "alice", "key": "key-a", "rate_limit": 60}, {"name": "bob", "key": "key-b"}]


def client_of(server, key: str, **options: object) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, **options)


def say(client: OpenAI, text: str, **options: object):
    return client.chat.completions.create(model="default", messages=user(played(text)), **options)


def access_lines(server) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in server.output.splitlines() if line.startswith("{")]
    return [line for line in lines if line["logger"] == "mlxd.access"]


def test_the_sdk_waits_as_long_as_a_429_says_and_is_let_in(start):
    server = start(
        {"worker": {"backend": "playback"}, "limits": {"api_keys": KEYS}, "log": {"format": "json"}}
    )
    with client_of(server, "key-a", max_retries=0) as impatient, client_of(server, "key-a") as patient:
        with pytest.raises(openai.RateLimitError) as refusal:
            for _ in range(70):
                say(impatient, "x", max_tokens=1)
        headers = refusal.value.response.headers
        assert headers["retry-after"] == "1" and headers["x-ratelimit-remaining-requests"] == "0"
        began = time.monotonic()
        assert say(patient, "hello").choices[0].message.content == "hello"
        assert time.monotonic() - began > 0.5
        with client_of(server, "key-b", max_retries=0) as other:
            assert say(other, "free").choices[0].message.content == "free"
    refused = [line for line in access_lines(server) if line["status"] == 429]
    assert len(refused) >= 2 and all(line["key"] == "alice" for line in refused)
    assert refused[0]["error"] == "rate_limit_exceeded"


def test_a_full_queue_says_when_to_come_back(start):
    scheduler = {"max_num_seqs": 1, "max_queue": 1}
    worker = {"backend": "playback", "playback_tokens_per_second": 50.0}
    server = start({"worker": worker, "scheduler": scheduler})
    with connect(server) as client, ThreadPoolExecutor(2) as pool:
        running = say(client, "x" * 500, stream=True)
        next(running)
        waiting = pool.submit(say, client, "x")
        server.wait_until(lambda: server.status()["num_waiting"] == 1, 5.0, "the queue to fill")
        with pytest.raises(openai.InternalServerError) as refusal:
            say(client, "x")
        assert refusal.value.status_code == 503
        assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 120
        running.close()
        assert waiting.result(10).choices[0].message.content == "x"


def test_metrics_and_access_lines_tell_the_same(start):
    config = {
        "worker": {"backend": "playback", "playback_tokens_per_second": 200.0},
        "server": {"metrics": True},
        "limits": {"api_keys": KEYS},
        "log": {"format": "json"},
    }
    server = start(config)
    with client_of(server, "key-b") as client:
        answer = say(client, "hello")
        stream = say(client, "x" * 1000, stream=True)
        for _, _ in zip(range(5), stream, strict=False):
            pass
        stream.close()
    server.wait_until(lambda: b'status="499"' in server.get("/metrics")[1], 5.0, "the 499")
    status, body = server.get("/metrics")
    assert status == 200
    samples = [s for family in text_string_to_metric_families(body.decode()) for s in family.samples]

    def value(name: str, **labels: str) -> float:
        return next(s.value for s in samples if s.name == name and s.labels == labels)

    path = "/v1/chat/completions"
    whole, left = [line for line in access_lines(server) if line["path"] == path]
    assert answer.usage is not None
    assert whole["completion_tokens"] == answer.usage.completion_tokens == 6
    assert (whole["key"], whole["status"], whole["finish_reason"]) == ("bob", 200, "stop")
    assert (left["key"], left["status"], left["error"]) == ("bob", 499, "client_closed_request")
    assert 0 < left["completion_tokens"] < 1000
    assert value("mlxd_requests_total", endpoint=path, status="200", finish_reason="stop") == 1
    assert value("mlxd_requests_total", endpoint=path, status="499", finish_reason="abort") == 1
    assert value("mlxd_aborts_total", reason="disconnect") == 1
    for kind in ("prompt", "completion"):
        counted = value("mlxd_key_tokens_total", key="bob", kind=kind)
        assert counted == whole[f"{kind}_tokens"] + left[f"{kind}_tokens"]
    assert value("mlxd_sequences_running") == value("mlxd_requests_in_flight") == 0
    assert value("mlxd_worker_up") == 1


@pytest.mark.slow
def test_two_saturating_keys_get_their_shares():
    assert fairness_bench(["--seconds", "4", "--token-rate", "300"]) == 0


@pytest.mark.slow
def test_500_clients_of_which_a_third_leave_and_a_tenth_err():
    flags = ["--requests", "1500", "--concurrency", "500", "--token-rate", "1000"]
    assert soak_bench([*flags, "--abort-fraction", "0.33", "--invalid-fraction", "0.1"]) == 0
