"""Neutral events: what an answer is made of, before a dialect gives it its own names; and tools.

They do not know HTTP, JSON or tokens. Every answer is some of these in order, and `Finished` once, last.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mlxd.engine.request import FinishReason


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that may be called. `parameters` is the JSON schema of its arguments, {} for any.

    `extras` are what else the client said of it: some templates show more than these.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool | None = None
    extras: dict[str, Any] = {}


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """More of the visible answer. Never empty."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """More of the model's thinking. Never empty."""

    text: str


class ToolCallStart(msgspec.Struct, frozen=True, gc=False):
    """A call begins. `index` counts an answer's calls from 0; the tool's result will refer to `id`."""

    index: int
    id: str
    name: str


class ToolCallDelta(msgspec.Struct, frozen=True, gc=False):
    """More of call `index`'s arguments: JSON text, whole only once all of its deltas are joined."""

    index: int
    arguments: str


class Finished(msgspec.Struct, frozen=True):
    """The end. `stop_reason` is the stop string or token id that caused it, None for the model's own end."""

    finish_reason: FinishReason
    stop_reason: str | int | None = None


Event = TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | Finished
