"""Reads calls that nothing announces: JSON objects and arrays in the middle of text, fenced or not.

It does not know families. Such a call stands at the beginning of the text, after whitespace or after another
call; in a code fence, the fence is part of it.
"""

from __future__ import annotations

import re
from typing import ClassVar

from mlxd.chat.tool_parsers.base import ToolFormat
from mlxd.chat.tool_parsers.json_calls import read_json_array, read_json_calls
from mlxd.chat.tool_parsers.source import Malformed, Reading

FENCE = "```"
_LANGUAGE = re.compile(r"[\w-]+")
# What may follow, and what may yet come where nothing does: a key, an object, a name.
_SPACE = r"[ \t\r\n]*+"
_KEY = rf'{_SPACE}(?:\Z|"(?:\Z|[a-z]))'
_MAY_BEGIN = {"{": re.compile(_KEY), "[": re.compile(rf"{_SPACE}(?:\Z|\w|\{{{_KEY})")}


class BareFormat(ToolFormat):
    """A format that has bare JSON calls beside its others."""

    openings: ClassVar[tuple[str, ...]] = ("{", "[", FENCE)

    def is_prose(self, opening: str) -> bool:
        events, source = self.session.events, self.source
        if opening == FENCE:
            return not events.at_line_start
        may_begin = _MAY_BEGIN.get(opening)
        return may_begin is not None and not (
            events.after_space and may_begin.match(source.text, source.position)
        )

    def read_bare(self, opening: str) -> Reading[None]:
        """Reads calls at one of `openings`."""
        source = self.source
        if opening == FENCE:
            yield from source.take(_LANGUAGE)
            opening = yield from source.skip_whitespace()
            if opening not in ("{", "["):
                raise Malformed
            source.position += 1
            yield from self._read_calls(opening)
            yield from source.accept(FENCE)
        else:
            yield from self._read_calls(opening)

    def read_bare_array(self) -> Reading[None]:
        """Reads an array after its bracket."""
        yield from read_json_array(self, is_bare=True)

    def _read_calls(self, opening: str) -> Reading[None]:
        if opening == "[":
            yield from self.read_bare_array()
        else:
            self.source.position -= 1
            yield from read_json_calls(self, is_bare=True)
