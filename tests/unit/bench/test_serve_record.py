"""The record of a request: frames in any cut, times by chunk, tokens by usage, outcomes."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.record import EventSplitter, Record
from tests.unit.bench.fake_server import DONE, delta, usage


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def new_record(
    loop: asyncio.AbstractEventLoop, *, stream: bool = True, cut_after: int | None = None
) -> Record:
    record = Record(0, start=10.0, stream=stream, done=loop.create_future(), cut_after=cut_after)
    record.on_head(200, 10.5)
    return record


@given(
    payloads=st.lists(st.sampled_from([b"{}", b'{"a":1}', b"[DONE]", "é".encode()]), max_size=6),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_events_are_the_same_however_the_bytes_are_cut(payloads, newline, cuts):
    data = b"".join(b": comment" + newline + b"data: " + p + newline * 2 for p in payloads)
    splitter = EventSplitter()
    got = []
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        got += splitter.feed(data[start:end])
    assert got == payloads
    assert splitter.is_empty


def test_an_event_of_several_data_lines_is_joined():
    assert EventSplitter().feed(b"event: x\ndata: a\ndata:b\n\n") == [b"a\nb"]


def test_times_follow_chunks_and_tokens_follow_usage(loop):
    record = new_record(loop)
    record.on_body(delta(""), 11.0)
    record.on_body(delta("a"), 12.0)
    record.on_body(delta("b"), 13.0)
    record.on_body(delta("c") + usage(5, 9) + DONE, 16.0)
    record.on_end(None, 17.0)
    assert record.outcome == "ok"
    assert (record.ttft, record.e2e, list(record.gaps)) == (2.0, 7.0, [1.0, 3.0])
    assert (record.prompt_tokens, record.output_tokens) == (5, 9)
    assert record.tpot == 4.0 / 8
    assert record.tokens_per_gap == 4.0


def test_a_stream_without_done_is_truncated(loop):
    record = new_record(loop)
    record.on_body(delta("a"), 12.0)
    record.on_end(None, 13.0)
    assert record.outcome == "truncated"


def test_an_error_frame_is_an_error_although_the_status_is_200(loop):
    record = new_record(loop)
    record.on_body(delta("a") + b'data: {"error":{"message":"worker died"}}\n\n' + DONE, 12.0)
    record.on_end(None, 13.0)
    assert record.outcome == "stream_error"
    assert "worker died" in record.error_message


def test_a_frame_that_is_not_json_is_a_protocol_error(loop):
    record = new_record(loop)
    record.on_body(b"data: {oops\n\n", 12.0)
    record.on_end(None, 13.0)
    assert record.outcome == "protocol"


def test_a_cut_comes_after_the_chunk_it_names(loop):
    cuts = []
    record = new_record(loop, cut_after=2)
    record.on_cut = lambda: cuts.append(record.num_text_chunks)
    record.on_body(delta("a") + delta("b") + delta("c"), 12.0)
    assert cuts == [2]
    assert record.outcome == "cut"


def test_a_whole_answer_has_tokens_and_no_ttft(loop):
    record = new_record(loop, stream=False)
    record.on_body(b'{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":3,', 12.0)
    record.on_body(b'"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}', 12.0)
    record.on_end(None, 13.0)
    assert (record.outcome, record.ttft, record.e2e) == ("ok", None, 3.0)
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (3, 2, 1)
