"""Output streams: what a reader gets of several requests."""

from __future__ import annotations

import asyncio

from mlxd.engine.request import FinishReason, RequestOutput
from mlxd.engine.stream import OutputStream


def test_news_of_each_request_are_joined_until_they_are_read() -> None:
    loop = asyncio.new_event_loop()
    stream = OutputStream(3, loop, on_cancel=lambda _: None, on_drained=lambda _: None)
    loop.close()
    for index, text in ((2, "a"), (0, "b"), (2, "c"), (0, "d")):
        stream.push(RequestOutput(index, text, [len(text)]))
    assert [(output.index, output.text, output.token_ids) for output in stream.take()] == [
        (2, "ac", [1, 1]),
        (0, "bd", [1, 1]),
    ]
    assert stream.take() == [] and stream.num_tokens == 4
    # What has been read is no longer added to.
    stream.push(RequestOutput(2, "e", [9], finish_reason=FinishReason.STOP))
    [output] = stream.take()
    assert (output.text, output.token_ids) == ("e", [9]) and not stream.is_finished
