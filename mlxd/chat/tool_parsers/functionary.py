"""MeetKai Functionary: `<|recipient|>f … {…}` (v2), `>>>f … {…}` (v3.2), `<function=f>{…}` (v3.1).

It does not know other families. Format: the prompt templates of https://github.com/MeetKai/functionary. What
is addressed to `all` is text. The first `<|recipient|>` or `>>>` of an answer is usually part of the prompt.
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.base import ToolFormat
from mlxd.chat.tool_parsers.json_calls import read_arguments
from mlxd.chat.tool_parsers.python_values import NAME
from mlxd.chat.tool_parsers.source import Malformed, Reading
from mlxd.chat.tool_parsers.tags import FUNCTION, read_function

FROM, RECIPIENT = "<|from|>", "<|recipient|>"
_CONTENT, _STOP = "<|content|>", "<|stop|>"
_ARROWS = ">>>"
_EVERYBODY = "all"


class FunctionaryFormat(ToolFormat):
    name = "functionary"
    aliases = ("meetkai",)
    markers: ClassVar[tuple[str, ...]] = (FUNCTION,)
    openings: ClassVar[tuple[str, ...]] = (FROM, RECIPIENT, _ARROWS, _STOP)
    preserve_special_tokens = True
    template_hints = (RECIPIENT, ">>>all")

    def read_beginning(self) -> Reading[None]:
        yield from self._read_message(is_certain=False)

    def read(self, opening: str) -> Reading[None]:
        if opening == FUNCTION:
            yield from read_function(self)
            return
        if opening == _STOP:  # of a message that was text
            return
        if opening == FROM:
            yield from self.source.take(NAME)
            yield from self.source.expect(RECIPIENT)
        yield from self._read_message(is_certain=opening != _ARROWS)

    def _read_message(self, *, is_certain: bool) -> Reading[None]:
        """Reads a recipient and, unless that is everybody, the arguments for it."""
        source = self.source
        name = yield from source.take(NAME)
        if (yield from source.accept_here("\n")) != "\n":
            source.fail()
        found = yield from source.accept_here(_CONTENT)
        if is_certain and not found:
            source.fail()
        if name == _EVERYBODY:
            return
        if not is_certain and not self.session.may_call(name):
            raise Malformed
        call = self.new_call()
        call.set_name(name)
        if (yield from source.peek()) == "{" or not is_certain:
            yield from read_arguments(source, call)
        call.end()
        yield from source.accept(_STOP)
