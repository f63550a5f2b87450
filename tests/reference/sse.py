"""The twin of mlxd._ext.sse: the same frames by way of the standard library's json.

It does not know the extension.
"""

from __future__ import annotations

import json as stdlib_json
import re

DONE = b"data: [DONE]\n\n"

SURROGATE = re.compile("[\ud800-\udfff]")


def escape_json(text: str) -> bytes:
    quoted = stdlib_json.dumps(text, ensure_ascii=False)
    return SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted[1:-1]).encode()


def frame(json: bytes) -> bytes:
    _check_one_line(json)
    return b"data: %b\n\n" % json


def event_frame(event: bytes | str, json: bytes) -> bytes:
    name = event.encode() if isinstance(event, str) else event
    _check_one_line(name)
    return b"event: %b\n" % name + frame(json)


class TextFrame:
    def __init__(self, prefix: bytes, suffix: bytes) -> None:
        _check_one_line(prefix)
        _check_one_line(suffix)
        self.prefix = prefix
        self.suffix = suffix

    def encode(self, delta: str) -> bytes:
        return frame(self.prefix + escape_json(delta) + self.suffix)


def _check_one_line(value: bytes) -> None:
    if b"\n" in value or b"\r" in value:
        raise ValueError(f"a line break in {value!r}")
