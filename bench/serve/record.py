"""One request as the client saw it: its times, its chunks, its tokens, how it ended.

It does not know sockets or load. Times are seconds of the clock that the connection was given; tokens come
from the server's `usage`, because an SSE chunk may hold part of a token, one, or many.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable

import msgspec


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Text | None = None
    message: _Text | None = None

    def has_text(self) -> bool:
        if self.text:
            return True
        part = self.delta or self.message
        return part is not None and bool(part.content or part.reasoning or part.reasoning_content)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Body(msgspec.Struct):
    """What is read of a response or of one frame of it; chat and completions, streamed or not."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_DECODER = msgspec.json.Decoder(_Body)


class EventSplitter:
    """Cuts a byte stream into the `data` of its server-sent events, however it arrives."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *frames, self._rest = data.split(b"\n\n")
        return [payload for frame in frames if (payload := self._payload(frame)) is not None]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of an unfinished event."""
        return not self._rest.strip()

    @staticmethod
    def _payload(frame: bytes) -> bytes | None:
        if frame.startswith(b"data: ") and b"\n" not in frame:
            return frame[6:]
        lines = [line[5:].removeprefix(b" ") for line in frame.split(b"\n") if line.startswith(b"data:")]
        return b"\n".join(lines) if lines else None


class Record:
    """An `Exchange` (bench.serve.http) that keeps the figures.

    `start` is when the request was due (open loop) or sent (closed loop). `gaps` are the seconds between
    one chunk with text and the next. `outcome` is `ok`, `cut` (we left on purpose), `refused` (it was wrong
    on purpose), or the kind of error: `not_refused`, `http_429` and the like, `stream_error` (an error frame
    inside a 200), `truncated`, `disconnected`, `protocol`, `connect`, `timeout`. `cut_after` chunks with
    text, `on_cut` is called (0: at the head).
    """

    __slots__ = (
        "_body",
        "_events",
        "_saw_done",
        "cached_tokens",
        "cut_after",
        "done",
        "end",
        "error_message",
        "first_text",
        "gaps",
        "has_usage",
        "head",
        "index",
        "last_text",
        "num_text_chunks",
        "on_cut",
        "outcome",
        "output_tokens",
        "prompt_tokens",
        "start",
        "status",
    )

    def __init__(
        self,
        index: int,
        *,
        start: float,
        stream: bool,
        done: asyncio.Future[None],
        cut_after: int | None = None,
    ) -> None:
        self.index = index
        self.start = start
        self.done = done
        self.cut_after = cut_after
        self.on_cut: Callable[[], None] | None = None
        self._events = EventSplitter() if stream else None
        self._body: list[bytes] = []
        self._saw_done = False
        self.status = 0
        self.head: float | None = None
        self.first_text: float | None = None
        self.last_text: float | None = None
        self.end = start
        self.gaps = array("d")
        self.num_text_chunks = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.has_usage = False
        self.outcome = ""
        self.error_message = ""

    # What the connection calls.

    def on_head(self, status: int, now: float) -> None:
        self.status = status
        self.head = now
        if status != 200:
            self._events = None
        elif self.cut_after == 0:
            self._cut(now)

    def on_body(self, data: bytes, now: float) -> None:
        if self._events is None:
            self._body.append(data)
            return
        for payload in self._events.feed(data):
            if self.outcome == "cut":
                return
            if payload == b"[DONE]":
                self._saw_done = True
            else:
                self._on_frame(payload, now)

    def on_end(self, error: str | None, now: float) -> None:
        if self.outcome:
            return
        self.end = now
        if error is not None:
            self.outcome = error
        elif self._events is not None:
            complete = self._saw_done and self._events.is_empty
            self.outcome = "ok" if complete else "truncated"
        else:
            self._on_whole(b"".join(self._body))

    def judge_refusal(self) -> None:
        """The request was wrong: that the server said so is `refused`, that it did not is an error."""
        if 400 <= self.status < 500:
            self.outcome = "refused"
        elif self.status == 200:
            self.outcome, self.error_message = "not_refused", "a wrong request was answered"

    def fail(self, kind: str, message: str, now: float) -> None:
        """End the record from outside: no connection, out of time."""
        if not self.outcome:
            self.outcome, self.error_message, self.end = kind, message, now

    # What it comes to.

    @property
    def ttft(self) -> float | None:
        """Seconds from `start` to the first chunk with text."""
        return None if self.first_text is None else self.first_text - self.start

    @property
    def e2e(self) -> float:
        """Seconds from `start` to the end of the response."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds an output token after the first, by `usage`."""
        if self.first_text is None or self.last_text is None or self.output_tokens < 2:
            return None
        return (self.last_text - self.first_text) / (self.output_tokens - 1)

    @property
    def tokens_per_gap(self) -> float:
        """How many tokens a gap stands for: those after the first, spread evenly over the gaps."""
        return (self.output_tokens - 1) / len(self.gaps) if self.gaps and self.output_tokens > 1 else 1.0

    def _on_frame(self, payload: bytes, now: float) -> None:
        body = self._decode(payload)
        if body is None:
            return
        if any(choice.has_text() for choice in body.choices):
            if self.last_text is None:
                self.first_text = now
            else:
                self.gaps.append(now - self.last_text)
            self.last_text = now
            self.num_text_chunks += 1
            if self.num_text_chunks == self.cut_after:
                self._cut(now)

    def _on_whole(self, data: bytes) -> None:
        if self.status != 200:
            self.outcome = f"http_{self.status}"
            self.error_message = data[:500].decode("utf-8", "replace")
        elif self._decode(data) is not None and not self.outcome:
            self.outcome = "ok"

    def _decode(self, payload: bytes) -> _Body | None:
        try:
            body = _DECODER.decode(payload)
        except msgspec.DecodeError as error:
            self.outcome, self.error_message = "protocol", str(error)
            return None
        if body.usage is not None:
            self.has_usage = True
            self.prompt_tokens = body.usage.prompt_tokens
            self.output_tokens = body.usage.completion_tokens
            details = body.usage.prompt_tokens_details
            self.cached_tokens = (details.cached_tokens or 0) if details is not None else 0
        if (raw := bytes(body.error)) not in (b"", b"null"):
            self.outcome, self.error_message = "stream_error", raw[:500].decode("utf-8", "replace")
        return body

    def _cut(self, now: float) -> None:
        self.outcome = "cut"
        self.end = now
        if self.on_cut is not None:
            self.on_cut()
