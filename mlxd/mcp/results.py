"""What a tool answers, as text that a model can read.

It does not know the protocol's package: blocks come as the JSON that the protocol defines.
"""

from __future__ import annotations

from typing import Any

import msgspec
import orjson


class McpResult(msgspec.Struct, frozen=True, kw_only=True):
    """`text` is what a model is shown; `blocks` are the protocol's content blocks as JSON."""

    text: str
    blocks: list[dict[str, Any]] = []
    structured: Any = None
    is_error: bool = False


def error_result(message: str) -> McpResult:
    """An error of ours, in the place of a tool's answer."""
    return McpResult(text=message, blocks=[{"type": "text", "text": message}], is_error=True)


def read_result(
    blocks: list[dict[str, Any]], structured: Any, *, is_error: bool, max_bytes: int
) -> McpResult:
    """The result, unless it is larger than `max_bytes` of JSON: then an error that says so."""
    size = len(orjson.dumps(blocks)) + (0 if structured is None else len(orjson.dumps(structured)))
    if size > max_bytes:
        return error_result(f"the tool's result has {size} bytes, more than the {max_bytes} that are allowed")
    texts = [_text(block) for block in blocks]
    if not texts and structured is not None:
        texts = [orjson.dumps(structured).decode()]
    return McpResult(text="\n".join(texts), blocks=blocks, structured=structured, is_error=is_error)


def _text(block: dict[str, Any]) -> str:
    kind = block.get("type")
    if kind == "text":
        return str(block.get("text", ""))
    if kind == "resource":
        resource = block.get("resource") or {}
        return str(resource.get("text") or f"[resource {resource.get('uri', '')}]")
    if kind == "resource_link":
        return f"[resource {block.get('uri', '')}]"
    return f"[{kind}]"
