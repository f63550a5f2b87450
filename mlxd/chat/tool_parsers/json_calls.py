"""Reads calls written as JSON objects: `{"name": "f", "arguments": {…}}`, alone, several or in an array.

It does not know the tags around them. "parameters" is as good as "arguments", the two keys may come in
either order, arguments may be JSON inside a string, and all of it may stand under "function", as in OpenAI's
own shape. Other keys are read over, but an object that has such and no arguments is no call.
"""

from __future__ import annotations

import json
import re

from mlxd.chat.tool_parsers.base import ToolFormat
from mlxd.chat.tool_parsers.call import Call
from mlxd.chat.tool_parsers.json_output import JsonOutput
from mlxd.chat.tool_parsers.source import Malformed, Reading, Source
from mlxd.chat.tool_parsers.values import (
    KEY,
    KEY_BEGINNING,
    STRING,
    STRING_BEGINNING,
    JsonReader,
    read_json_string,
    whole_value,
)

_ARGUMENTS = ("arguments", "parameters")
_SURROGATE = re.compile("[\ud800-\udfff]")
_KEYS = frozenset(("name", "function", "type", "id", *_ARGUMENTS))


def read_json_calls(tool_format: ToolFormat, *, is_bare: bool = False) -> Reading[None]:
    """Reads an array of call objects, or call objects one after another (between them nothing, "," or ";").

    `is_bare`: nothing but their shape says that they are calls. Then a key that calls do not have, or a name
    that is no tool's, makes text of them; where no tools are known, so do missing arguments.
    """
    source = tool_format.source
    if (yield from source.skip_whitespace()) == "[":
        source.position += 1
        yield from read_json_array(tool_format, is_bare=is_bare)
        return
    yield from _read_call(tool_format, is_bare)
    while (yield from _follows_another(source, ",;")):
        yield from _read_call(tool_format, is_bare)


def read_json_array(tool_format: ToolFormat, *, is_bare: bool = False) -> Reading[None]:
    """Reads the rest of an array of call objects, after its bracket; at least one."""
    source = tool_format.source
    yield from source.skip_whitespace()
    yield from _read_call(tool_format, is_bare)
    while (yield from _follows_another(source, ",")):
        yield from _read_call(tool_format, is_bare)
    if (yield from source.peek()):
        yield from source.expect("]")


def read_arguments(source: Source, call: Call) -> Reading[None]:
    """Reads arguments after whitespace: an object, that object's JSON in a string, or null for none."""
    character = yield from source.skip_whitespace()
    if character == "{":
        yield from JsonReader(source, call.output).read()
    elif character == '"':
        text = yield from read_string(source)
        if text.strip():
            arguments = whole_value(text, JsonReader) if text.lstrip()[0] == "{" else None
            if arguments is None:
                raise Malformed
            call.output.value(arguments)
    else:
        yield from source.expect("null")


def _follows_another(source: Source, separators: str) -> Reading[bool]:
    """Whether an object follows, then it stands next; a separator that leads to none is Malformed."""
    character = yield from source.skip_whitespace()
    if character and character in separators:
        source.position += 1
        character = yield from source.skip_whitespace()
        if character not in ("{", "]", ""):
            raise Malformed
    return character == "{"


def _read_call(tool_format: ToolFormat, is_bare: bool) -> Reading[None]:
    call = tool_format.new_call()
    keys: set[str] = set()
    yield from _read_members(tool_format, call, is_bare, keys)
    if keys.isdisjoint(_ARGUMENTS) and (keys - _KEYS or (is_bare and not tool_format.session.tools)):
        raise Malformed
    call.end()


def _read_members(tool_format: ToolFormat, call: Call, is_bare: bool, keys: set[str]) -> Reading[None]:
    """Reads the object and what it says of the call, and adds its keys to `keys`."""
    source = tool_format.source
    yield from source.expect("{")
    while True:
        yield from source.skip_whitespace()
        if found := (yield from source.take_whole(KEY, KEY_BEGINNING)):
            key = found[1 : found.rindex('"')]
        else:
            pieces: list[str] = []
            yield from source.expect('"')
            yield from read_json_string(source, pieces.append)
            key = "".join(pieces)
            yield from source.expect(":")
        character = yield from source.skip_whitespace()
        if key == "function" and character == "{" and key not in keys:
            keys.add(key)
            yield from _read_members(tool_format, call, is_bare, keys)
        elif key in ("name", "function"):
            name = yield from read_string(source)
            if is_bare and not tool_format.session.may_call(name):
                raise Malformed
            call.set_name(name)
        elif key in _ARGUMENTS and keys.isdisjoint(_ARGUMENTS):
            yield from read_arguments(source, call)
        elif is_bare and key not in _KEYS:
            raise Malformed
        else:
            yield from JsonReader(source, JsonOutput(_discard)).read()
        keys.add(key)
        if (yield from source.expect(",", "}")) == "}" or (yield from source.accept("}")):
            return


def read_string(source: Source) -> Reading[str]:
    """Reads a JSON string; returns what it says."""
    yield from source.skip_whitespace()
    if whole := (yield from source.take_whole(STRING, STRING_BEGINNING)):
        return whole[1:-1]
    yield from source.expect('"')
    pieces: list[str] = []
    yield from read_json_string(source, pieces.append)
    text: str = json.loads(f'"{"".join(pieces)}"')
    if _SURROGATE.search(text):
        raise Malformed  # it could not be sent as UTF-8
    return text


def _discard(text: str) -> None:
    """Where the values of keys that a call does not have go."""
