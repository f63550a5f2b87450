"""Qwen 2.5 and 3: JSON in `<tool_call>`, function tags, and `[Calling tool: f({"a": 1})]`.

It does not know other families. Format: https://qwen.readthedocs.io/en/latest/framework/function_call.html
"""

from __future__ import annotations

import re
from typing import ClassVar

from mlxd.chat.tool_parsers.json_calls import read_arguments
from mlxd.chat.tool_parsers.source import Reading
from mlxd.chat.tool_parsers.tags import FUNCTION, TOOL_CALL, TaggedFormat

_CALLING = "[Calling tool:"
_NAME = re.compile(r"[^\s()\[\]{}]+")


class QwenFormat(TaggedFormat):
    name = "qwen"
    aliases = ("qwen3",)
    markers: ClassVar[tuple[str, ...]] = (TOOL_CALL, FUNCTION, _CALLING)
    model_types = (
        "qwen2",
        "qwen2_moe",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
    )

    def read(self, opening: str) -> Reading[None]:
        if opening == _CALLING:
            yield from self._read_calling()
        else:
            yield from super().read(opening)

    def _read_calling(self) -> Reading[None]:
        source = self.source
        call = self.new_call()
        yield from source.skip_whitespace()
        call.set_name((yield from source.take(_NAME)))
        yield from source.expect("(")
        if (yield from source.skip_whitespace()) != ")":
            yield from read_arguments(source, call)
        yield from source.expect(")")
        call.end()
        yield from source.accept("]")
