"""DeepSeek V3, R1 and V3.1: calls between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.

It does not know other families. Format: the chat templates of deepseek-ai/DeepSeek-V3-0324, DeepSeek-R1-0528
(type, separator, name, fenced JSON) and DeepSeek-V3.1 (name, separator, JSON). The outer tags may be missing.
"""

from __future__ import annotations

import re
from typing import ClassVar

from mlxd.chat.tool_parsers.base import ToolFormat
from mlxd.chat.tool_parsers.json_calls import read_arguments
from mlxd.chat.tool_parsers.source import Reading

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_NAME = re.compile(r"[^<\s{]+")
_LANGUAGE = re.compile(r"\w+")


class DeepSeekFormat(ToolFormat):
    name = "deepseek"
    aliases = ("deepseek_v3", "deepseek_r1")
    markers: ClassVar[tuple[str, ...]] = (_CALLS, _CALL)
    preserve_special_tokens = True
    template_hints = (_CALLS,)
    model_types = ("deepseek_v3", "deepseek_v2")

    def read(self, opening: str) -> Reading[None]:
        source = self.source
        if opening == _CALLS:
            yield from source.expect(_CALL)
        found = _CALL
        while found == _CALL:
            yield from self._read_call()
            found = yield from source.accept(_CALL, _CALLS_END)

    def _read_call(self) -> Reading[None]:
        source = self.source
        call = self.new_call()
        yield from source.skip_whitespace()
        name = yield from source.take(_NAME)
        yield from source.expect(_SEPARATOR)
        if (yield from source.skip_whitespace()) not in ("{", "`", "<"):
            name = yield from source.take(_NAME)  # what came first was the call's type
            yield from source.skip_whitespace()
        call.set_name(name)
        if (yield from source.accept("```")):
            yield from source.take(_LANGUAGE)
        if (yield from source.skip_whitespace()) != "{":
            yield from source.accept("```")
            yield from source.expect(_CALL_END)
            call.end()
            return
        yield from read_arguments(source, call)
        call.end()
        yield from source.accept_closing("```")
        yield from source.accept_closing(_CALL_END)
