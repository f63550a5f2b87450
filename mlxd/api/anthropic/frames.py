"""Outputs into the events of Anthropic's stream.

It does not know HTTP or the engine; a delta costs one escape and two joins.
"""

from __future__ import annotations

from typing import Any

import orjson

from mlxd._ext.sse import TextFrame, event_frame
from mlxd.api.anthropic.blocks import SIGNATURE, BlockSplitter, ContentBlock, Kind
from mlxd.api.anthropic.message import MessageHead
from mlxd.api.errors import anthropic_error
from mlxd.chat.answer import AnswerRecord
from mlxd.chat.pipeline import OutputPipeline
from mlxd.engine.request import FinishReason, RequestOutput
from mlxd.errors import HTTPStatusError

PING_SECONDS = 10.0
PING = event_frame("ping", b'{"type":"ping"}')

_DELTA = b"event: content_block_delta\n"


class MessageFrames:
    """message_start, the blocks, message_delta with the reason and the usage, message_stop."""

    def __init__(
        self,
        head: MessageHead,
        pipeline: OutputPipeline,
        splitter: BlockSplitter,
        record: AnswerRecord | None = None,
    ) -> None:
        self.ping_seconds = PING_SECONDS
        self._head = head
        self._pipeline = pipeline
        self._splitter = splitter
        self._record = record
        self._open: ContentBlock | None = None
        self._delta_frame: TextFrame | None = None
        self._last: RequestOutput | None = None

    def start(self) -> bytes:
        """message_start with the prompt's tokens, and a first ping: the prompt may take its time."""
        return _event("message_start", message=self._head.opening()) + PING

    def render(self, outputs: list[RequestOutput]) -> bytes:
        """The frames of the sequence's new output, joined; a ping where there is none."""
        if not outputs:
            return PING
        [output] = outputs
        events = self._pipeline.feed(output.text)
        if output.finish_reason is not None:
            events += self._pipeline.finish()
        if self._record is not None:
            self._record.add(events)
        parts: list[bytes] = []
        for event in events:
            text = self._splitter.place(event)
            if self._splitter.block is not self._open:
                self._switch(parts)
            if text and self._delta_frame is not None:
                parts.append(_DELTA + self._delta_frame.encode(text))
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._last = output
        return b"".join(parts)

    def end(self) -> bytes:
        """The open block's end, why it ended, and message_stop."""
        parts: list[bytes] = []
        self._splitter.finish()
        if self._splitter.block is not self._open:
            self._switch(parts)
        self._close(parts)
        assert self._last is not None
        closing = self._head.closing(self._last, has_calls=self._splitter.has_calls)
        usage = closing.pop("usage")
        parts += [_event("message_delta", delta=closing, usage=usage), _event("message_stop")]
        if self._record is not None:
            self._record.is_complete = True
        return b"".join(parts)

    def failure(self, error: HTTPStatusError) -> bytes:
        """One error event."""
        return event_frame("error", orjson.dumps(anthropic_error(error, self._head.request_id)))

    def _switch(self, parts: list[bytes]) -> None:
        """Ends the open block and begins the splitter's."""
        self._close(parts)
        block = self._open = self._splitter.block
        assert block is not None
        parts.append(_event("content_block_start", index=block.index, content_block=block.opening()))
        kind = block.kind
        before = (
            f'{{"type":"content_block_delta","index":{block.index},'
            f'"delta":{{"type":"{kind.delta_type}","{kind.field}":"'
        )
        self._delta_frame = TextFrame(before.encode(), b'"}}')

    def _close(self, parts: list[bytes]) -> None:
        block = self._open
        if block is None:
            return
        if block.kind is Kind.THINKING:
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            parts.append(_event("content_block_delta", index=block.index, delta=delta))
        parts.append(_event("content_block_stop", index=block.index))


def _event(type_: str, **fields: Any) -> bytes:
    return event_frame(type_, orjson.dumps({"type": type_, **fields}))
