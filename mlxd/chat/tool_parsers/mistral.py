"""Mistral: `[TOOL_CALLS]` before an array of JSON calls, or before each `f{…}` or `f[ARGS]{…}`.

It does not know other families. Format: https://docs.mistral.ai, and mistral-common's tokenisers v3 (array),
v11 (`f{…}`) and v13 (`f[ARGS]{…}`, with `[CALL_ID]` between for a while).
"""

from __future__ import annotations

import re
from typing import ClassVar

from mlxd.chat.tool_parsers.base import ToolFormat
from mlxd.chat.tool_parsers.json_calls import read_arguments, read_json_array, read_json_calls
from mlxd.chat.tool_parsers.source import Reading

TOOL_CALLS = "[TOOL_CALLS]"
_NAME = re.compile(r"[^\s{}\[\]\"]+")
_CALL_ID_LENGTH = 9


class MistralFormat(ToolFormat):
    """Ids have nine characters: Mistral's templates refuse any other."""

    name = "mistral"
    markers: ClassVar[tuple[str, ...]] = (TOOL_CALLS,)
    preserve_special_tokens = True
    template_hints = (TOOL_CALLS,)
    model_types = ("mistral", "mistral3", "mistral4", "ministral", "ministral3", "mixtral", "pixtral")

    def make_id(self) -> str:
        return super().make_id()[-_CALL_ID_LENGTH:]

    def read(self, opening: str) -> Reading[None]:
        source = self.source
        character = yield from source.skip_whitespace()
        if character == "[":
            source.position += 1
            yield from read_json_array(self)
        elif character == "{":
            yield from read_json_calls(self)
        else:
            yield from self._read_named()

    def _read_named(self) -> Reading[None]:
        source = self.source
        call = self.new_call()
        call.set_name((yield from source.take(_NAME)))
        if (yield from source.accept("[CALL_ID]", "[ARGS]")) == "[CALL_ID]":
            yield from source.take(_NAME)
            yield from source.expect("[ARGS]")
        yield from read_arguments(source, call)
        call.end()
