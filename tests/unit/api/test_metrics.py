"""GET /metrics by the official parser, the Grafana board by the page, and the access line by its fields."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.api.fakes import FakeEngine, call, make_app
from tests.unit.api.stack import ACCESS_LOGGER, Stack, play
from tests.unit.engine.fake_worker import FakeDisk

PATH = "/v1/completions"
BOARD = Path(__file__).parents[3] / "configs" / "grafana-dashboard.json"
SETTINGS = {
    "server": {"metrics": True},
    "limits": {
        "api_keys": [{"name": "alice", "key": "ka"}, {"name": "bob", "key": "kb", "rate_limit": 1}],
    },
    "scheduler": {"max_num_seqs": 2},
}
KINDS = {
    "mlxd_requests": "counter",
    "mlxd_requests_in_flight": "gauge",
    "mlxd_aborts": "counter",
    "mlxd_rate_limited": "counter",
    "mlxd_key_tokens": "counter",
    "mlxd_sequences": "counter",
    "mlxd_sequences_running": "gauge",
    "mlxd_sequences_waiting": "gauge",
    "mlxd_waiting_tokens": "gauge",
    "mlxd_preemptions": "counter",
    "mlxd_resumed_sequences": "counter",
    "mlxd_prompt_tokens": "counter",
    "mlxd_generation_tokens": "counter",
    "mlxd_queue_seconds": "histogram",
    "mlxd_prefill_seconds": "histogram",
    "mlxd_time_to_first_token_seconds": "histogram",
    "mlxd_inter_token_latency_seconds": "histogram",
    "mlxd_time_per_output_token_seconds": "histogram",
    "mlxd_e2e_latency_seconds": "histogram",
    "mlxd_sequence_prompt_tokens": "histogram",
    "mlxd_sequence_generation_tokens": "histogram",
    "mlxd_step_seconds": "histogram",
    "mlxd_step_tokens": "histogram",
    "mlxd_step_batch_size": "histogram",
    "mlxd_kv_cache_usage_ratio": "gauge",
    "mlxd_kv_cache_blocks": "gauge",
    "mlxd_prefix_cache_query_tokens": "counter",
    "mlxd_prefix_cache_hit_tokens": "counter",
    "mlxd_prefix_cache_evicted_tokens": "counter",
    "mlxd_prefix_cache_requests": "counter",
    "mlxd_background_prefills": "counter",
    "mlxd_background_tokens": "counter",
    "mlxd_prefix_cache_blocks": "gauge",
    "mlxd_prefix_cache_evictable_blocks": "gauge",
    "mlxd_prefix_cache_states": "gauge",
    "mlxd_worker_up": "gauge",
    "mlxd_worker_restarts": "counter",
    "mlxd_worker_heartbeat_age_seconds": "gauge",
    "mlxd_device_memory_bytes": "gauge",
    "mlxd_info": "gauge",
    "mlxd_event_loop_lag_seconds": "histogram",
}


class Page:
    """A scrape: families by name, and samples by name and labels."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, tuple(sorted(labels.items()))))


async def scrape(stack: Stack) -> Page:
    response = await stack.ask("GET", "/metrics")
    assert response.status == 200
    assert response.headers[b"content-type"].startswith(b"text/plain; version=0.0.4")
    return Page(response.body.decode())


async def traffic(stack: Stack) -> None:
    """Three answers, a refusal, a mistake, and a client that leaves."""
    ask = {"prompt": [3, 4, 5], "max_tokens": 7, "ignore_eos": True}
    assert (await stack.ask("POST", PATH, ask, x_api_key="ka")).status == 200
    assert (await stack.ask("POST", PATH, {**ask, "n": 3, "stream": True}, x_api_key="ka")).status == 200
    assert (await stack.ask("POST", PATH, ask, x_api_key="kb")).status == 200
    assert (await stack.ask("POST", PATH, ask, x_api_key="kb")).status == 429
    assert (await stack.ask("POST", PATH, {"prompt": 5}, x_api_key="ka")).status == 400
    assert (await stack.ask("GET", "/favicon.ico")).status == 404
    stack.worker.hold = True
    leaving, waiting = stack.connect(), stack.connect()
    await leaving.send("POST", PATH, {**ask, "stream": True}, x_api_key="ka")
    await waiting.send("POST", PATH, {**ask, "n": 2}, x_api_key="ka")
    assert (await scrape(stack))("mlxd_sequences_waiting") == 2
    await leaving.lose()
    stack.worker.release_held()
    assert (await waiting.response()).status == 200


def test_the_page_is_off_unless_enabled() -> None:
    response = call(make_app(FakeEngine()), "GET", "/metrics")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_every_metric_is_there_from_the_start_and_needs_no_key(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        page = await scrape(stack)
        assert {name: family.type for name, family in page.families.items()} == KINDS
        assert all(family.documentation for family in page.families.values())
        assert page("mlxd_worker_up") == 1
        assert page("mlxd_requests_in_flight") == 0
        assert page("mlxd_aborts_total", reason="disconnect") == 0
        assert page("mlxd_rate_limited_total", limit="tokens") == 0
        assert page("mlxd_kv_cache_blocks") == 63
        info = next(iter(page.families["mlxd_info"].samples))
        assert (info.labels["model_type"], info.value) == ("fake", 1)

    play(scenario, model_folder, SETTINGS)


def test_the_page_counts_what_happened(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        await traffic(stack)
        page = await scrape(stack)
        requests = {
            labels: value for (name, labels), value in page.samples.items() if name == "mlxd_requests_total"
        }

        def count(endpoint: str, status: str, finish_reason: str = "") -> float:
            labels = {"endpoint": endpoint, "status": status, "finish_reason": finish_reason}
            return requests[tuple(sorted(labels.items()))]

        assert count(PATH, "200", "length") == 4
        assert count(PATH, "429") == count(PATH, "400") == 1
        assert count("other", "404") == 1
        assert count(PATH, "499", "abort") == 1
        assert count("/metrics", "200") == 1, "the scrape before this one"
        assert page("mlxd_requests_in_flight") == 0
        assert page("mlxd_rate_limited_total", limit="requests") == 1
        assert page("mlxd_aborts_total", reason="disconnect") == 1
        assert page("mlxd_sequences_total", finish_reason="length") == 7
        assert page("mlxd_sequences_total", finish_reason="abort") == 1
        assert page("mlxd_prompt_tokens_total") == 8 * 3
        generated = page("mlxd_generation_tokens_total")
        assert generated is not None and generated >= 7 * 7
        assert page("mlxd_key_tokens_total", key="bob", kind="prompt") == 3
        assert page("mlxd_key_tokens_total", key="bob", kind="completion") == 7
        assert page("mlxd_key_tokens_total", key="alice", kind="prompt") == 4 * 3
        assert page("mlxd_time_to_first_token_seconds_count") == page("mlxd_prefill_seconds_count")
        assert page("mlxd_inter_token_latency_seconds_count") == generated - (
            page("mlxd_time_to_first_token_seconds_count") or 0
        )
        assert page("mlxd_sequence_prompt_tokens_sum") == 8 * 3
        assert page("mlxd_sequence_prompt_tokens_bucket", le="2.0") == 0
        assert page("mlxd_sequence_prompt_tokens_bucket", le="4.0") == 8
        assert page("mlxd_sequence_prompt_tokens_bucket", le="+Inf") == 8
        assert page("mlxd_step_seconds_count") == len(stack.worker.plans)

    play(scenario, model_folder, SETTINGS)


def test_a_lost_worker_shows(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        stack.time += 4.0
        assert (await scrape(stack))("mlxd_worker_heartbeat_age_seconds") == 4
        stack.worker.die()
        await stack.until(lambda: not stack.is_ready())
        page = await scrape(stack)
        assert (page("mlxd_worker_up"), page("mlxd_worker_restarts_total")) == (0, 1)
        await stack.until(stack.is_ready)
        assert (await scrape(stack))("mlxd_worker_up") == 1

    play(scenario, model_folder, SETTINGS)


# The board


def expressions() -> list[str]:
    board = json.loads(BOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def test_the_board_asks_for_nothing_that_does_not_exist(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        await traffic(stack)
        stack.engine.stats.disk.errors["damaged"] += 1
        page = await scrape(stack)
        labels: dict[str, set[str]] = {}
        for name, pairs in page.samples:
            labels.setdefault(name, set()).update(label for label, _ in pairs)
        for expression in expressions():
            names = re.findall(r"\bmlxd_\w+", expression)
            assert names and set(names) <= set(labels), expression
            grouped = {
                label.strip()
                for group in re.findall(r"by \(([^)]*)\)", expression)
                for label in group.split(",")
            }
            known = set().union(*(labels[name] for name in names))
            assert grouped <= known, expression
            assert expression.count('{instance=~"$instance"}') == len(names), expression
        text = " ".join(expressions())
        for family in page.families:
            if family.startswith("mlxd_disk_"):
                assert re.search(rf"\b{family}(_total)?\b", text), family

    play(scenario, model_folder, SETTINGS | {"cache": {"disk_path": "/nowhere"}}, disk=FakeDisk())


def test_the_board_shows_every_metric() -> None:
    text = " ".join(expressions())
    shown = {name for name in KINDS if re.search(rf"\b{name}(_total|_bucket|_sum)?\b", text)}
    assert set(KINDS) - shown == {"mlxd_kv_cache_blocks", "mlxd_info"}


def test_the_boards_panels_do_not_overlap() -> None:
    panels = json.loads(BOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken and grid["x"] + grid["w"] <= 24
        taken |= cells


# The access line


def test_the_access_line_says_who_asked_and_what_it_took(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(stack: Stack) -> None:
        ask = {"prompt": [3, 4, 5], "max_tokens": 7, "ignore_eos": True}
        for stream in (False, True):
            await stack.ask("POST", PATH, {**ask, "n": 2, "stream": stream}, x_api_key="ka", x_request_id="r")
        await stack.ask("POST", PATH, ask, x_api_key="no")
        await stack.ask("GET", "/health")

    with caplog.at_level(logging.INFO, ACCESS_LOGGER):
        play(scenario, model_folder, SETTINGS)
    whole, stream, unauthorised, health = [r.__dict__ for r in caplog.records if r.name == ACCESS_LOGGER]
    for line in (whole, stream):
        expected = {
            "client": "10.0.0.9:4242",
            "status": 200,
            "request_id": "r",
            "key": "alice",
            "prompt_tokens": 3,
            "completion_tokens": 14,
            "finish_reason": "length",
        }
        assert {name: line[name] for name in expected} == expected
        assert "error" not in line
    assert (unauthorised["status"], unauthorised["error"]) == (401, "invalid_api_key")
    assert "key" not in unauthorised
    assert health["status"] == 200 and "prompt_tokens" not in health
