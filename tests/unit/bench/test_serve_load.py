"""The load generator against a scripted server on a real socket: loops, connections, errors, cuts."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from bench.serve.http import Address, encode_request
from bench.serve.load import Client
from bench.serve.workload import Lengths, Workload, arrivals
from tests.unit.bench.fake_server import HEAD, Request, chunk, delta, fake_server, stream, whole


def drive(reply, *, requests: int = 4, concurrency: int = 2, url: str | None = None, **options):
    """Run `requests` against a fake server; returns (records in index order, server)."""
    workload = options.pop("workload", Workload(seed=1, output_tokens=Lengths("fixed", 3)))

    async def run():
        async with fake_server(reply, unix_socket=url) as server:
            client = Client(Address.parse(server.url), workload, clock=time.perf_counter, **options)
            load = await client.closed_loop(concurrency=concurrency, num_requests=requests, seconds=None)
            client.pool.close()
            await asyncio.sleep(0)
            return sorted(load.records, key=lambda record: record.index), server

    return asyncio.run(run())


def test_every_request_is_sent_once_and_ends_ok():
    records, server = drive(lambda _: stream("a", "b", "c"), requests=7)
    assert [(r.index, r.outcome, r.output_tokens, r.num_text_chunks) for r in records] == [
        (i, "ok", 3, 3) for i in range(7)
    ]
    assert {r.path for r in server.requests} == {"/v1/chat/completions"}
    assert server.requests[0].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(("keep_alive", "expected"), [(True, 2), (False, 6)])
def test_connections_are_kept_only_when_asked(keep_alive, expected):
    _, server = drive(lambda _: stream("a"), requests=6, concurrency=2, keep_alive=keep_alive)
    assert server.num_connections == expected


def test_a_unix_socket_serves_as_well(tmp_path):
    records, _ = drive(lambda _: stream("a"), url=str(tmp_path / "s"))
    assert [record.outcome for record in records] == ["ok"] * 4


def test_the_key_goes_out_as_bearer():
    _, server = drive(lambda _: stream("a"), requests=1, api_key="secret")
    assert server.requests[0].headers["authorization"] == "bearer secret"


def test_errors_are_told_apart():
    replies = {
        0: whole(429, {"error": {"message": "slow down"}}),
        1: [HEAD, chunk(delta("a")), None],
        2: [None],
        3: [b"nonsense\r\n\r\n"],
        4: [HEAD, chunk(b'data: {"error":{"message":"x"}}\n\n'), b"0\r\n\r\n"],
        5: stream("a"),
    }
    order = iter(range(6))
    records, _ = drive(lambda _: replies[next(order)], requests=6, concurrency=1)
    assert [record.outcome for record in records] == [
        "http_429",
        "truncated",
        "disconnected",
        "protocol",
        "stream_error",
        "ok",
    ]
    assert "slow down" in records[0].error_message


def test_an_idle_connection_that_the_server_closed_is_not_an_error():
    answers = {1: stream("a"), 2: [None], 3: stream("b")}

    def reply(_: Request):
        return answers.pop(min(answers))

    records, server = drive(reply, requests=2, concurrency=1)
    assert [record.outcome for record in records] == ["ok", "ok"]
    assert len(server.requests) == 3
    assert server.num_connections == 2


def test_no_server_is_a_connect_error():
    async def run():
        async with fake_server(lambda _: []) as server:
            address = Address.parse(server.url)
        client = Client(address, Workload(seed=0), clock=time.perf_counter)
        return await client.run(client.workload.request(0))

    assert asyncio.run(run()).outcome == "connect"


def test_a_silent_server_times_out():
    records, _ = drive(lambda _: [HEAD], requests=1, timeout_seconds=0.05)
    assert records[0].outcome == "timeout"


def test_cut_streams_close_their_socket_and_the_rest_go_on():
    workload = Workload(seed=3, output_tokens=Lengths("fixed", 3), abort_fraction=0.5)
    records, server = drive(lambda _: stream("a", "b", "c"), requests=20, concurrency=1, workload=workload)
    planned = [workload.request(i).cut_after is not None for i in range(20)]
    assert [record.outcome == "cut" for record in records] == planned
    assert {record.outcome for record in records} == {"ok", "cut"}
    # One connection lasts until a cut; then there is a new one.
    assert server.num_connections == sum(planned[:-1]) + 1


def test_whole_answers():
    body = {"choices": [{"text": "hi"}], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}
    workload = Workload(seed=0, api="completions", stream=False)
    records, server = drive(lambda _: whole(200, body), requests=2, workload=workload)
    assert [(r.outcome, r.output_tokens) for r in records] == [("ok", 1), ("ok", 1)]
    assert server.requests[0].path == "/v1/completions"


def test_the_open_loop_times_from_when_a_request_was_due():
    now = [100.0]

    async def run():
        async with fake_server(lambda _: stream("a")) as server:
            client = Client(Address.parse(server.url), Workload(seed=0), clock=lambda: now[0])
            # All were due in the past of a clock that stands still two seconds later.
            due = iter([-2.0, -1.0, 0.0])
            return await client.open_loop(due, num_requests=None, seconds=None)

    load = asyncio.run(run())
    assert sorted(record.e2e for record in load.records) == [0.0, 1.0, 2.0]
    assert load.late_seconds == 2.0


def test_calibration_finds_tokens_a_word():
    def reply(request: Request):
        words = len(request.body["messages"][0]["content"].split())
        return stream("a", prompt_tokens=9 + 2 * words)

    async def run():
        async with fake_server(reply) as server:
            client = Client(Address.parse(server.url), Workload(seed=0), clock=time.perf_counter)
            return await client.calibrate()

    calibration = asyncio.run(run())
    assert (calibration.tokens_per_word, calibration.overhead_tokens) == (2.0, 9.0)
    assert calibration.words(109) == 50


def test_requests_are_a_function_of_seed_and_index():
    workload = Workload(
        seed=5, prompt_tokens=Lengths("uniform", 4, 40), shared_prefix=0.5, abort_fraction=0.3
    )
    assert workload.request(17) == workload.request(17)
    assert len({workload.request(i).body for i in range(50)}) == 50
    first, second = (workload.text(20, random.Random(i)).split() for i in (1, 2))
    assert first[:10] == second[:10]
    assert first[10:] != second[10:]


@pytest.mark.parametrize("text", ["0", "x", "uniform:5", "uniform:9:3", "lognormal:8:-1", "normal:3:4"])
def test_bad_lengths_say_what_is_allowed(text):
    with pytest.raises(ValueError, match="lognormal:MEDIAN:SIGMA"):
        Lengths.parse(text)


def test_lengths_stay_in_range():
    rng = random.Random(0)
    drawn = [Lengths.parse("lognormal:100:1.0:300").draw(rng) for _ in range(500)]
    assert 1 <= min(drawn) < 100 < max(drawn) == 300
    assert {Lengths.parse("uniform:2:4").draw(rng) for _ in range(100)} == {2, 3, 4}
    assert Lengths.parse("12").draw(rng) == 12


def test_poisson_arrivals_have_the_rate_and_repeat():
    def first(process, n=2000):
        times = arrivals(50.0, process, 7)
        return [next(times) for _ in range(n)]

    assert first("poisson") == first("poisson")
    assert first("poisson")[-1] == pytest.approx(2000 / 50, rel=0.1)
    assert first("fixed", 3) == [0.0, 0.02, 0.04]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:81/x/v1/", Address("h", 81, prefix="/x")),
        ("https://h", Address("h", 443, tls=True)),
        ("unix:/tmp/s", Address("localhost", 0, unix_socket="/tmp/s")),
    ],
)
def test_addresses(url, expected):
    assert Address.parse(url) == expected


def test_an_address_needs_a_scheme():
    with pytest.raises(ValueError, match="not a URL"):
        Address.parse("localhost:8000")


def test_a_request_is_one_piece_of_bytes():
    raw = encode_request(Address("::1", 80), "POST", "/p", b"{}", headers={"a": "b"}, keep_alive=False)
    assert raw == (
        b"POST /p HTTP/1.1\r\nhost: [::1]:80\r\na: b\r\ncontent-type: application/json\r\n"
        b"content-length: 2\r\nconnection: close\r\n\r\n{}"
    )


def test_wrong_requests_are_to_be_refused():
    workload = Workload(seed=1, output_tokens=Lengths("fixed", 3), invalid_fraction=0.5)
    specs = [workload.request(index) for index in range(40)]
    assert 10 < sum(spec.invalid for spec in specs) < 30
    assert specs == [workload.request(index) for index in range(40)]
    plain = Workload(seed=1, output_tokens=Lengths("fixed", 3))
    assert all((plain.request(spec.index).body == spec.body) == (not spec.invalid) for spec in specs)

    def refuse(status):
        return lambda request: whole(status, {"error": {"message": "no"}})

    wrong = Workload(seed=1, output_tokens=Lengths("fixed", 3), invalid_fraction=1.0)
    assert wrong.request(0).invalid and wrong.request(0).body.endswith(b"}")
    for answer, outcome in (
        (refuse(400), "refused"),
        (refuse(404), "refused"),
        (refuse(500), "http_500"),
        (lambda request: stream("a"), "not_refused"),
    ):
        [record], _ = drive(answer, requests=1, workload=wrong)
        assert record.outcome == outcome
