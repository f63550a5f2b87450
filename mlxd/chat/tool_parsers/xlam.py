"""Salesforce xLAM: `[{"name": …, "arguments": {…}}]`, bare, fenced, after `[TOOL_CALLS]` or `</think>`.

It does not know other families. Format: the model cards of Salesforce/xLAM-2 and its chat templates.
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.bare import FENCE, BareFormat
from mlxd.chat.tool_parsers.json_calls import read_json_calls
from mlxd.chat.tool_parsers.mistral import TOOL_CALLS
from mlxd.chat.tool_parsers.source import Reading
from mlxd.chat.tool_parsers.tags import TOOL_CALL, TOOL_CALL_END

_THINK_END = "</think>"


class XLAMFormat(BareFormat):
    name = "xlam"
    markers: ClassVar[tuple[str, ...]] = (TOOL_CALLS, TOOL_CALL)
    openings: ClassVar[tuple[str, ...]] = ("{", "[", FENCE, _THINK_END)
    preserve_special_tokens = True
    template_hints = ("make calls in a single JSON array",)

    def read(self, opening: str) -> Reading[None]:
        source, events = self.source, self.session.events
        if opening == _THINK_END:
            events.text(opening)
            events.begin_line()
            source.record()
        elif opening in self.markers:
            yield from read_json_calls(self)
            yield from source.accept(TOOL_CALL_END)
        else:
            yield from self.read_bare(opening)
