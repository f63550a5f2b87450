"""Reads calls between tags that several families share: `<tool_call>…` and `<function=f>…`.

It does not know which family it reads for: each says which tags it has, and all bodies are understood.
"""

from __future__ import annotations

import re
from typing import ClassVar

from mlxd.chat.tool_parsers.base import ToolFormat
from mlxd.chat.tool_parsers.json_calls import read_arguments, read_json_calls
from mlxd.chat.tool_parsers.parameters import ParameterWriter
from mlxd.chat.tool_parsers.source import Reading
from mlxd.text.markers import MarkerScanner

FUNCTION = "<function="
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION_END = "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_ENDS = (_FUNCTION_END, TOOL_CALL_END)
_VALUE_ENDS = MarkerScanner((_PARAMETER_END, _PARAMETER, *_ENDS))
_OTHER_TAG = re.compile(r"[ \t\r\n]*+<[^f]")
_TAG_VALUE = re.compile(r"[^<>\s]+")


class TaggedFormat(ToolFormat):
    """Calls in tags: `closers` maps an opening tag to the one that closes it, which may be missing.

    Inside are JSON calls (one, several or an array) or function tags.
    """

    closers: ClassVar[dict[str, str]] = {TOOL_CALL: TOOL_CALL_END}
    markers: ClassVar[tuple[str, ...]] = (TOOL_CALL,)

    def is_prose(self, opening: str) -> bool:
        """A tag must not follow a tag, but for a function's."""
        source = self.source
        return opening[0] == "<" and _OTHER_TAG.match(source.text, source.position) is not None

    def read(self, opening: str) -> Reading[None]:
        if opening == FUNCTION:
            yield from read_function(self)
        else:
            yield from self.read_body(self.closers[opening])

    def read_body(self, closer: str) -> Reading[None]:
        """Reads what follows an opening tag, and its closing tag."""
        if (yield from self.source.skip_whitespace()) == "<":
            yield from read_functions(self, closer)
        else:
            yield from read_json_calls(self)
            yield from self.source.accept(closer)


def read_functions(tool_format: ToolFormat, closer: str) -> Reading[None]:
    """Reads one or more function tags, and the closing tag of what they stand in."""
    source = tool_format.source
    yield from source.expect(FUNCTION)
    found = FUNCTION
    while found == FUNCTION and (yield from read_function(tool_format)) != closer:
        found = yield from source.accept(FUNCTION, closer)


def read_function(tool_format: ToolFormat) -> Reading[str]:
    """Reads a function tag after its `<function=`: `f>{"a":1}</function>` or `f><parameter=a>1</parameter>…`.

    Returns the tag that closed it, which is that of the tag around it where its own is missing.
    """
    source = tool_format.source
    call = tool_format.new_call()
    name = yield from source.take(_TAG_VALUE)
    yield from source.expect(">")
    call.set_name(name)
    if (yield from source.skip_whitespace()) == "{":
        yield from read_arguments(source, call)
        call.end()
        return (yield from source.accept_closing(_FUNCTION_END))
    parameters = ParameterWriter(tool_format.session, call, name)
    tag = yield from source.expect(_PARAMETER, *_ENDS)
    while tag not in _ENDS:
        key = yield from source.take(_TAG_VALUE)
        yield from source.expect(">")
        tag = yield from parameters.add(key, _VALUE_ENDS)
        if tag == _PARAMETER_END:
            tag = yield from source.expect(_PARAMETER, *_ENDS)
    parameters.close()
    call.end()
    return tag
