"""Gemma 4: `<|tool_call>call:f{k:<|"|>v<|"|>,n:42}<tool_call|>`; FunctionGemma likewise, with other tags.

It does not know other families. Format: https://ai.google.dev/gemma/docs, function calling. Keys stand
without quotes, strings between quote tokens, all else as in JSON; plain JSON is understood too.
"""

from __future__ import annotations

import re
from typing import ClassVar, NamedTuple

from mlxd.chat.tool_parsers.base import ToolFormat
from mlxd.chat.tool_parsers.json_calls import read_string
from mlxd.chat.tool_parsers.json_output import JsonOutput, json_string_body
from mlxd.chat.tool_parsers.python_values import WORDS
from mlxd.chat.tool_parsers.schema import ANY, Types, argument_types, encode_argument
from mlxd.chat.tool_parsers.source import Malformed, Reading, Source
from mlxd.chat.tool_parsers.values import NUMBERS, ValueReader, read_json_string
from mlxd.text.markers import MarkerScanner


class _Dialect(NamedTuple):
    quote: str
    quotes: MarkerScanner
    closer: str


_DIALECTS = {
    "<|tool_call>": _Dialect('<|"|>', MarkerScanner(('<|"|>',)), "<tool_call|>"),
    "<start_function_call>": _Dialect("<escape>", MarkerScanner(("<escape>",)), "<end_function_call>"),
}
_NAME = re.compile(r"[^{}<>\s]+")
_BARE = re.compile(r"[^:,{}\[\]<>\"]+")
_BARE_VALUE = re.compile(r"[^,{}\[\]<>\"]+")


class Gemma4Format(ToolFormat):
    name = "gemma4"
    aliases = ("functiongemma",)
    markers: ClassVar[tuple[str, ...]] = tuple(_DIALECTS)
    preserve_special_tokens = True
    template_hints = markers
    model_types = ("gemma4", "gemma4_text")

    def read(self, opening: str) -> Reading[None]:
        source = self.source
        dialect = _DIALECTS[opening]
        call = self.new_call()
        yield from source.expect("call:")
        name = yield from source.take(_NAME)
        call.set_name(name)
        tool = self.session.tools.get(name)
        output = call.output
        yield from source.expect("{")
        output.open("{")
        reader = _GemmaReader(source, output, dialect)
        separator = ""
        while (yield from source.skip_whitespace()) != "}":
            key = yield from reader.take_key()
            reader.types = ANY
            if tool is not None and (yield from source.skip_whitespace()) not in ("{", "["):
                reader.types = argument_types(tool.parameters, key)
            output.hold(f'{separator}"{json_string_body(key)}": ')
            yield from reader.read()
            if (yield from source.skip_whitespace()) != "}":
                yield from source.expect(",")
            separator = ", "
        source.position += 1
        output.close()
        call.end()
        yield from source.accept(dialect.closer)


class _GemmaReader(ValueReader):
    """Gemma's notation. A value without quotes that is no other JSON value is a string all the same."""

    items = NUMBERS

    def __init__(self, source: Source, output: JsonOutput, dialect: _Dialect) -> None:
        super().__init__(source, output)
        self.types: Types = ANY
        self._quote = dialect.quote
        self._quotes = dialect.quotes

    def read_key(self) -> Reading[None]:
        self.types = ANY
        key = yield from self.take_key()
        self.output.hold(f'"{json_string_body(key)}": ')

    def take_key(self) -> Reading[str]:
        """Reads a key and its colon; returns the key."""
        character = yield from self.source.peek()
        if character == '"':
            key = yield from read_string(self.source)
        elif character == "<":
            yield from self.source.expect(self._quote)
            pieces: list[str] = []
            if not (yield from self.source.copy_until(self._quotes, pieces.append)):
                self.source.fail()
            key = "".join(pieces)
        else:
            key = (yield from self.source.take(_BARE)).strip()
            if not key:
                self.source.fail()
        yield from self.source.expect(":")
        return key

    def read_scalar(self, character: str) -> Reading[None]:
        source, output = self.source, self.output
        if character == "<":
            yield from source.expect(self._quote)
            output.begin_string()
            if not (yield from source.copy_until(self._quotes, self._write_string)):
                source.fail()
            output.end_string()
        elif character == '"':
            source.position += 1
            output.begin_string()
            yield from read_json_string(source, output.string)
            output.end_string()
        else:
            text = (yield from source.take(_BARE_VALUE)).strip()
            if not (yield from source.peek()):
                source.fail()  # half a value, or the whole: nobody knows
            if not text:
                raise Malformed
            word = WORDS.get(text) if self.types == ANY else None
            output.value(word or encode_argument(text, self.types))

    def _write_string(self, text: str) -> None:
        self.output.string(json_string_body(text))
