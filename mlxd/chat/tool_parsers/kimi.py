"""Kimi K2: calls between `<|tool_calls_section_begin|>` and `<|tool_calls_section_end|>`, each with its id.

It does not know other families. Format: https://github.com/MoonshotAI/Kimi-K2, docs/tool_call_guidance.md,
which asks that ids be given back as they are: `functions.f:0`, counting through the conversation.
"""

from __future__ import annotations

import re
from typing import ClassVar

from mlxd.chat.tool_parsers.base import ToolFormat
from mlxd.chat.tool_parsers.call import Session
from mlxd.chat.tool_parsers.json_calls import read_arguments
from mlxd.chat.tool_parsers.source import Reading

_SECTION = "<|tool_calls_section_begin|>"
_SECTION_END = "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"[^<\s]+")
_ID_PARTS = re.compile(r"(?:functions\.)?(.+?)(?::([0-9]{1,9}))?", re.DOTALL)


class KimiFormat(ToolFormat):
    name = "kimi"
    aliases = ("kimi_k2", "moonshot")
    markers: ClassVar[tuple[str, ...]] = (_SECTION, _CALL)
    preserve_special_tokens = True
    template_hints = (_SECTION, _CALL)
    model_types = ("kimi_k2", "kimi_k25", "kimi_linear")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._used_indices: set[int] = set()
        self._next_index = 0

    def read(self, opening: str) -> Reading[None]:
        source = self.source
        if opening == _SECTION:
            yield from source.expect(_CALL)
        found = _CALL
        while found == _CALL:
            yield from self._read_call()
            found = yield from source.accept(_CALL, _SECTION_END)

    def _read_call(self) -> Reading[None]:
        source = self.source
        yield from source.skip_whitespace()
        parts = _ID_PARTS.fullmatch((yield from source.take(_ID)))
        if parts is None:
            source.fail()
        name, index = parts.groups()
        call = self.new_call(lambda: self._make_id(name, index))
        call.set_name(name)
        yield from source.expect(_ARGUMENTS)
        if (yield from source.skip_whitespace()) == "<":
            yield from source.expect(_CALL_END)
            call.end()
            return
        yield from read_arguments(source, call)
        call.end()
        yield from source.accept_closing(_CALL_END)

    def _make_id(self, name: str, written: str | None) -> str:
        """The id as the model wrote it, with the next free index where it left that out or repeats one."""
        index = int(written) if written else self._next_index
        if index in self._used_indices:
            index = self._next_index
        self._used_indices.add(index)
        self._next_index = max(self._next_index, index + 1)
        return f"functions.{name}:{index}"
