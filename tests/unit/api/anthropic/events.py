"""Anthropic's event streams as tests look at them."""

from __future__ import annotations

from typing import Any

import msgspec


def read_events(body: bytes) -> list[dict[str, Any]]:
    """The JSON of each event; checks the framing, and that the event's name is its type."""
    *frames, rest = body.split(b"\n\n")
    assert rest == b"" and b"\r" not in body
    events = []
    for frame in frames:
        name, data = frame.split(b"\n")
        event = msgspec.json.decode(data.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        events.append(event)
    return events


def assembled(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events make; checks their order. Pings may be anywhere."""
    start, *middle, delta, stop = [event for event in events if event["type"] != "ping"]
    assert (start["type"], delta["type"], stop) == (
        "message_start",
        "message_delta",
        {"type": "message_stop"},
    )
    message: dict[str, Any] = start["message"]
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    content: list[dict[str, Any]] = []
    is_open = False
    for event in middle:
        assert event["index"] == len(content) - (event["type"] != "content_block_start")
        assert is_open is (event["type"] != "content_block_start")
        match event["type"]:
            case "content_block_start":
                content.append({**event["content_block"], "deltas": []})
                is_open = True
            case "content_block_delta":
                content[-1]["deltas"].append(event["delta"])
            case "content_block_stop":
                content[-1] = _whole(content[-1])
                is_open = False
    assert not is_open
    return {**message, "content": content, **delta["delta"], "usage": message["usage"] | delta["usage"]}


def _whole(block: dict[str, Any]) -> dict[str, Any]:
    deltas = block.pop("deltas")
    if block["type"] == "tool_use":
        assert block["input"] == {}
        text = "".join(delta["partial_json"] for delta in deltas)
        assert {delta["type"] for delta in deltas} <= {"input_json_delta"}
        return {**block, "input": msgspec.json.decode(text) if text else {}}
    assert block[block["type"]] == ""
    if block["type"] == "thinking":
        assert block["signature"] == ""
        *deltas, signature = deltas
        assert signature.pop("type") == "signature_delta"
        block |= signature
    field = block["type"]
    assert {delta["type"] for delta in deltas} <= {f"{field}_delta"}
    return {**block, field: "".join(delta[field] for delta in deltas)}
