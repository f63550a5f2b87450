"""Llama: `{"name": …, "parameters": {…}}` bare or after `<|python_tag|>`, function tags, calls in Python.

It does not know other families. Format: https://www.llama.com/docs/model-cards-and-prompt-formats (3.1: JSON
and function tags; 3.2 and 4: `[f(a=1), g(b="x")]`, in 4 also between `<|python_start|>` and `<|python_end|>`;
built-in tools: `<|python_tag|>f.call(a=1)`). LFM2 (https://docs.liquid.ai) writes the same array
between tags of its own.
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.bare import BareFormat
from mlxd.chat.tool_parsers.json_calls import read_json_array, read_json_calls
from mlxd.chat.tool_parsers.python_values import NAME, read_python_call
from mlxd.chat.tool_parsers.source import Malformed, Reading
from mlxd.chat.tool_parsers.tags import FUNCTION, read_function

_PYTHON_TAG = "<|python_tag|>"
_PYTHON_START, _PYTHON_END = "<|python_start|>", "<|python_end|>"
_LFM_START, _LFM_END = "<|tool_call_start|>", "<|tool_call_end|>"
_BUILT_IN = ".call"


class LlamaFormat(BareFormat):
    """Without a marker, Python calls must begin a line, and where tools are known every name must be one."""

    name = "llama"
    aliases = ("llama3", "llama4")
    markers: ClassVar[tuple[str, ...]] = (_PYTHON_TAG, _PYTHON_START, _LFM_START, FUNCTION)
    preserve_special_tokens = True
    template_hints = (_PYTHON_TAG, _PYTHON_START, _LFM_START, '"parameters": dictionary of argument name')
    model_types = ("llama4", "lfm2", "lfm2_moe")

    def read(self, opening: str) -> Reading[None]:
        source = self.source
        if opening == FUNCTION:
            yield from read_function(self)
        elif opening in self.markers:
            character = yield from source.skip_whitespace()
            if character == "{":
                yield from read_json_calls(self)
            elif character == "[":
                source.position += 1
                yield from self._read_array(is_bare=False)
            else:
                yield from self._read_built_in()
            yield from source.accept(_LFM_END if opening == _LFM_START else _PYTHON_END)
        else:
            yield from self.read_bare(opening)

    def read_bare_array(self) -> Reading[None]:
        yield from self._read_array(is_bare=True)

    def _read_array(self, *, is_bare: bool) -> Reading[None]:
        source = self.source
        if (yield from source.skip_whitespace()) == "{":
            yield from read_json_array(self, is_bare=is_bare)
            return
        if is_bare and not self.session.events.at_line_start:
            raise Malformed
        separator = ","
        while separator == ",":
            yield from source.skip_whitespace()
            name = yield from source.take(NAME)
            if is_bare and not self.session.may_call(name):
                raise Malformed
            call = self.new_call()
            call.set_name(name)
            yield from read_python_call(source, call)
            separator = yield from source.expect(",", "]")

    def _read_built_in(self) -> Reading[None]:
        """Reads `f.call(a=1)`; what else follows the tag is code for an interpreter, and stays text."""
        name = yield from self.source.take(NAME)
        if not name.endswith(_BUILT_IN):
            self.source.fail()
        call = self.new_call()
        call.set_name(name.removesuffix(_BUILT_IN))
        yield from read_python_call(self.source, call)
