"""Bodies of answers, streamed and not, in both dialects, as one kind of record; and what must hold for each.

It does not know what was asked. A body that breaks a rule (no end, two ends, anything after the end, a frame
that is none) raises Violation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson


class Violation(Exception):
    """An answer that no server may give."""


@dataclass(slots=True)
class Choice:
    """`reason` is None until it has ended. `calls` are names and arguments."""

    reasoning: str = ""
    text: str = ""
    calls: list[list[str]] = field(default_factory=list)
    reason: str | None = None

    def begins(self, whole: Choice) -> bool:
        """Whether `whole` could have been cut here."""
        if not (whole.reasoning.startswith(self.reasoning) and whole.text.startswith(self.text)):
            return False
        if len(self.calls) > len(whole.calls):
            return False
        return all(
            name == whole_name and arguments == whole_arguments[: len(arguments)]
            for (name, arguments), (whole_name, whole_arguments) in zip(self.calls, whole.calls, strict=False)
        )


@dataclass(slots=True)
class Answer:
    """`error`: what ended it, in the dialect's words; `is_cut`: its client left."""

    status: int
    choices: dict[int, Choice] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    is_cut: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and self.error is None and not self.is_cut

    def choice(self, index: int) -> Choice:
        return self.choices.setdefault(index, Choice())

    def check_whole(self) -> None:
        """Each of its choices has ended, and `usage` came. Raises Violation."""
        if not self.choices or any(choice.reason is None for choice in self.choices.values()):
            raise Violation("a choice has no end")
        if not self.prompt_tokens or self.cached_tokens >= self.prompt_tokens:
            raise Violation(f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens are cached")


def read_answer(api: str, streamed: bool, status: int, body: bytes, *, is_cut: bool) -> Answer:
    """`is_cut`: the client left, so the body may break off anywhere. Raises Violation."""
    answer = Answer(status, is_cut=is_cut)
    if is_cut and not (streamed and status == 200):
        return answer
    try:
        if status != 200:
            answer.error = orjson.loads(body)["error"]
        elif streamed:
            frames = body.split(b"\n\n")
            if frames.pop() and not is_cut:
                raise Violation("the last frame has no end")
            ended = (_read_events if api == "messages" else _read_chunks)(answer, frames)
            if not ended and not is_cut:
                raise Violation("the stream has no end")
        elif api == "messages":
            _read_message(answer, orjson.loads(body))
        else:
            _read_completion(answer, orjson.loads(body))
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise Violation(f"not as it should be: {error!r}") from error
    if answer.is_whole:
        answer.check_whole()
    return answer


def _read_usage(answer: Answer, usage: dict[str, Any]) -> None:
    answer.prompt_tokens = usage["prompt_tokens"]
    answer.completion_tokens = usage["completion_tokens"]
    answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


def _read_completion(answer: Answer, body: dict[str, Any]) -> None:
    _read_usage(answer, body["usage"])
    for said in body["choices"]:
        if said["index"] in answer.choices:
            raise Violation("two choices of one index")
        message = said.get("message") or {"content": said["text"]}
        calls = [
            [call["function"]["name"], call["function"]["arguments"]]
            for call in message.get("tool_calls") or []
        ]
        reasoning, text = message.get("reasoning") or "", message["content"] or ""
        answer.choices[said["index"]] = Choice(reasoning, text, calls, said["finish_reason"])


def _read_chunks(answer: Answer, frames: list[bytes]) -> bool:
    """Whether the stream has ended, with `[DONE]`."""
    for number, frame in enumerate(frames, 1):
        if frame.startswith(b":"):
            continue
        if not frame.startswith(b"data: "):
            raise Violation(f"no frame: {frame[:100]!r}")
        if frame == b"data: [DONE]":
            if number != len(frames):
                raise Violation("frames after [DONE]")
            return True
        if answer.error is not None:
            raise Violation("a frame after the error")
        chunk = orjson.loads(frame[6:])
        if "error" in chunk:
            answer.error = chunk["error"]
            continue
        if chunk.get("usage") is not None:
            if answer.prompt_tokens:
                raise Violation("usage twice")
            _read_usage(answer, chunk["usage"])
        for said in chunk["choices"]:
            _read_delta(answer.choice(said["index"]), said)
    return False


def _read_delta(choice: Choice, said: dict[str, Any]) -> None:
    if choice.reason is not None:
        raise Violation("a choice goes on after its end")
    delta = said.get("delta", {"content": said.get("text")})
    choice.reasoning += delta.get("reasoning") or ""
    choice.text += delta.get("content") or ""
    for call in delta.get("tool_calls") or []:
        if call["index"] == len(choice.calls):
            choice.calls.append([call["function"]["name"], ""])
        choice.calls[call["index"]][1] += call["function"].get("arguments") or ""
    choice.reason = said["finish_reason"]


def _read_message(answer: Answer, body: dict[str, Any]) -> None:
    choice = answer.choice(0)
    for block in body["content"]:
        if block["type"] == "text":
            choice.text += block["text"]
        elif block["type"] == "thinking":
            choice.reasoning += block["thinking"]
        else:
            choice.calls.append([block["name"], orjson.dumps(block["input"]).decode()])
    choice.reason = body["stop_reason"]
    _read_message_usage(answer, body["usage"])


def _read_message_usage(answer: Answer, usage: dict[str, Any]) -> None:
    answer.prompt_tokens = usage.get("input_tokens") or answer.prompt_tokens
    answer.cached_tokens = usage.get("cache_read_input_tokens") or answer.cached_tokens
    answer.completion_tokens = usage["output_tokens"]


def _read_events(answer: Answer, frames: list[bytes]) -> bool:
    """Whether the stream has ended, with message_stop or an error."""
    choice, open_block, has_begun = answer.choice(0), "", False
    for number, frame in enumerate(frames, 1):
        head, _, data = frame.partition(b"\n")
        event = orjson.loads(data.removeprefix(b"data: "))
        kind = event["type"]
        if head != b"event: " + kind.encode():
            raise Violation(f"an event of two types: {frame[:100]!r}")
        if kind in ("message_stop", "error"):
            answer.error = event.get("error")
            if number != len(frames):
                raise Violation(f"events after {kind}")
            if kind == "message_stop" and (open_block or choice.reason is None):
                raise Violation("the message stops before its end")
            return True
        if (choice.reason is not None and kind != "ping") or has_begun is (kind == "message_start"):
            raise Violation(f"{kind} out of its place")
        match kind:
            case "message_start":
                has_begun = True
                _read_message_usage(answer, event["message"]["usage"])
            case "content_block_start":
                block = event["content_block"]
                if open_block:
                    raise Violation("two blocks are open")
                open_block = block["type"]
                if open_block == "tool_use":
                    choice.calls.append([block["name"], ""])
            case "content_block_delta" if open_block == "text":
                choice.text += event["delta"]["text"]
            case "content_block_delta" if open_block == "thinking":
                choice.reasoning += event["delta"].get("thinking", "")
            case "content_block_delta" if open_block == "tool_use":
                choice.calls[-1][1] += event["delta"]["partial_json"]
            case "content_block_stop" if open_block:
                open_block = ""
            case "message_delta":
                choice.reason = event["delta"]["stop_reason"]
                _read_message_usage(answer, event["usage"])
            case "ping":
                pass
            case _:
                raise Violation(f"{kind} out of its place")
    return False
