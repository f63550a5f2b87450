"""Figures from records: percentiles, gaps spread over tokens, errors, and the command line around them."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest
from rich.console import Console

from bench.serve.__main__ import main
from bench.serve.load import Load
from bench.serve.record import Record
from bench.serve.summary import percentiles, print_summary, summarise
from tests.unit.bench.fake_server import DONE, FakeServer, delta, fake_server, stream, usage, whole


def record(texts: list[float], *, tokens: int, end: float, outcome: str = "ok") -> Record:
    """A stream that started at 0 with a chunk of text at each of `texts`."""
    loop = asyncio.new_event_loop()
    made = Record(0, start=0.0, stream=True, done=loop.create_future())
    loop.close()
    made.on_head(200, 0.0)
    for now in texts:
        made.on_body(delta("x"), now)
    made.on_body(usage(10, tokens) + DONE, end)
    made.on_end(None, end)
    if outcome != "ok":
        made.outcome, made.error_message = outcome, "why"
    return made


def test_percentiles_are_in_milliseconds():
    figures = percentiles(i / 1000 for i in range(101))
    assert figures is not None
    assert {
        name: round(figures[name], 6) for name in ("p50", "p90", "p95", "p99", "max", "mean", "count")
    } == {
        "p50": 50.0,
        "p90": 90.0,
        "p95": 95.0,
        "p99": 99.0,
        "max": 100.0,
        "mean": 50.0,
        "count": 101.0,
    }
    assert percentiles([]) is None


def test_figures_of_a_run():
    load = Load(
        records=[
            record([1.0, 2.0, 3.0], tokens=3, end=4.0),
            # Four tokens a chunk: each gap of a second is four tokens long.
            record([2.0, 3.0, 4.0], tokens=9, end=5.0),
            record([1.0], tokens=1, end=1.0, outcome="timeout"),
            record([1.0], tokens=1, end=1.0, outcome="cut"),
        ],
        seconds=6.0,
    )
    summary = summarise(load, client_cpu_seconds=3.0)
    latency = summary["latency_ms"]
    assert (summary["requests"], summary["ok"], summary["cut"], summary["errors"]) == (
        4,
        2,
        1,
        {"timeout": 1},
    )
    assert summary["error_examples"] == {"timeout": "why"}
    assert (summary["output_tokens"], summary["output_tokens_per_second"]) == (12, 2.0)
    assert summary["client"] == {"cpu_share": 0.5, "late_ms": 0.0}
    assert latency["ttft"]["mean"] == 1500.0
    assert latency["itl"]["count"] == 4
    assert latency["itl"]["mean"] == (1000 + 1000 + 250 + 250) / 4
    assert latency["tpot"]["max"] == 1000.0
    assert latency["max_gap"]["p50"] == 1000.0
    assert latency["e2e"]["max"] == 5000.0
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=120))
    for part in ("ttft", "2 of 4 requests ok", "timeout: why", "2.0 output tokens/s"):
        assert part in out.getvalue()


def test_a_run_in_which_nothing_worked_has_a_summary():
    load = Load(records=[record([], tokens=0, end=1.0, outcome="connect")], seconds=1.0)
    summary = summarise(load, client_cpu_seconds=0.0)
    assert summary["latency_ms"]["ttft"] is None
    print_summary(summary, Console(file=io.StringIO()))


@contextmanager
def serving(reply) -> Iterator[FakeServer]:
    """A fake server on a loop of its own, in a thread, for commands that run a loop themselves."""
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()
    found: list[FakeServer] = []

    async def run() -> None:
        async with fake_server(reply) as server:
            found.append(server)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    started.wait(5)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
        for task in asyncio.all_tasks(loop):
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()


def prompt_words(request) -> int:
    return len(request.body["messages"][0]["content"].split())


def test_the_command_writes_figures_with_their_provenance(tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    with serving(lambda r: stream("a", "b", prompt_tokens=5 + prompt_words(r))) as server:
        code = main(
            f"--url {server.url} --requests 9 --concurrency 3 --prompt-tokens 25 --output-tokens 2 "
            f"--seed 4 --api-key hidden --out {out}".split()
        )
        lengths = {prompt_words(request) for request in server.requests[-9:]}
    assert code == 0
    assert lengths == {20}
    result = orjson.loads(out.read_bytes())
    assert result["benchmark"] == "serve"
    assert result["seed"] == 4
    assert {"date", "machine", "versions", "commit", "flags"} <= result.keys()
    assert result["result"]["ok"] == 9
    assert result["result"]["prompt_tokens"] == 9 * 25
    assert b"hidden" not in out.read_bytes()
    assert "9 of 9 requests ok" in capsys.readouterr().out


def test_the_command_fails_when_requests_do(capsys):
    with serving(lambda _: whole(503, {"error": {"message": "full"}})) as server:
        assert main(["--url", server.url, "--requests", "3", "--no-calibrate"]) == 1
        assert "http_503" in capsys.readouterr().out
        assert main(["--url", server.url, "--requests", "3", "--no-calibrate", "--warmup", "0"]) == 1
        assert "0 of 3 requests ok" in capsys.readouterr().out


def test_a_dataset_is_sent_as_it_is(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "one"}], "max_tokens": 5, "body": {"ignore_eos": null}}\n'
        '\n{"prompt": "two"}\n'
    )
    with serving(lambda _: stream("a")) as server:
        flags = ["--requests", "2", "--concurrency", "1", "--warmup", "0", "--output-tokens", "7"]
        assert main(["--url", server.url, "--dataset", str(path), *flags]) == 0
        first, second = (request.body for request in server.requests)
    assert first["messages"] == [{"role": "user", "content": "one"}]
    assert (first["max_tokens"], second["max_tokens"]) == (5, 7)
    assert "ignore_eos" not in first
    assert second["ignore_eos"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--abort-fraction", "2"], "between 0 and 1"),
        (["--abort-fraction", "0.5", "--no-stream"], "needs --stream"),
        (["--rate", "0"], "above 0"),
        (["--concurrency", "0"], "at least 1"),
        (["--body", "[]"], "JSON object"),
        (["--url", "nowhere"], "not a URL"),
        (["--prompt-tokens", "0"], "invalid"),
        (["--dataset", "{path}"], "is needed"),
    ],
)
def test_wrong_flags_are_a_usage_error(flags, message, tmp_path, capsys):
    path = tmp_path / "set.jsonl"
    path.write_text('{"max_tokens": 3}\n')
    with pytest.raises(SystemExit) as stopped:
        main([flag.format(path=path) for flag in flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
