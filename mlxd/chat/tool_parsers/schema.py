"""What a tool's JSON schema says of its arguments' types, for formats that write values as plain text.

It does not know formats. It reads types only: whether the arguments are valid is the tool's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxd.chat.tool_parsers.json_output import json_string_body
from mlxd.chat.tool_parsers.python_values import WORDS, PythonReader
from mlxd.chat.tool_parsers.values import NUMBER, JsonReader, whole_value

Types = frozenset[str]
"""Names of JSON schema types; empty where the schema says nothing."""

STRING: Types = frozenset({"string"})
ANY: Types = frozenset()

_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
_MAX_DEPTH = 16
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.0+)?")


def argument_types(parameters: Mapping[str, Any], name: str) -> Types:
    """The types that the schema `parameters` allows for the argument `name`; `ANY` where it does not say."""
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return _types(properties[name], parameters, _MAX_DEPTH, {})
    return _types(parameters.get("additionalProperties"), parameters, _MAX_DEPTH, {})


def encode_argument(text: str, types: Types) -> str:
    """The JSON of a value that was written as plain text.

    A string where the schema allows nothing else. Otherwise null, a boolean, a number, an object or an array
    if the schema allows it and the text spells it (Python's spelling too); of several types the text's own.
    Where the schema says nothing: the JSON value that the text is, if it is one other than a string. In all
    other cases a string, so that nothing is lost.
    """
    value = text.strip()
    word = WORDS.get(value)
    if types:
        if word is not None and ("null" if word == "null" else "boolean") in types:
            return word
        if "number" in types and NUMBER.fullmatch(value):
            return value
        if "integer" in types and _INTEGER.fullmatch(value):
            return value
    elif word == value or NUMBER.fullmatch(value):
        return value
    kind = {"{": "object", "[": "array"}.get(value[:1])
    if kind and (not types or kind in types):
        encoded = whole_value(value, JsonReader)
        if encoded is None and types:
            encoded = whole_value(value, PythonReader)
        if encoded is not None:
            return encoded
    return f'"{json_string_body(text)}"'


def _types(schema: object, root: Mapping[str, Any], depth: int, known: dict[str, Types]) -> Types:
    """The types that a schema allows, as far as it can be seen without solving it.

    `known`: what references stand for, each looked at once; while one is looked at, any.
    """
    if not isinstance(schema, Mapping) or not depth:
        return ANY
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            known[reference] = ANY
            known[reference] = _types(resolve(reference, root), root, depth - 1, known)
        return known[reference]
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    types = frozenset(name for name in names if isinstance(name, str) and name in _TYPES)
    if types:
        return types | {"null"} if schema.get("nullable") is True else types
    for key in ("enum", "const"):
        if key in schema:
            values = schema[key] if key == "enum" and isinstance(schema[key], list) else [schema[key]]
            return frozenset(map(type_of, values))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found = [_types(part, root, depth - 1, known) for part in schema[key]]
            return frozenset().union(*found) if all(found) else ANY
    if isinstance(schema.get("allOf"), list):
        narrowed = [types for part in schema["allOf"] if (types := _types(part, root, depth - 1, known))]
        return frozenset.intersection(*narrowed) if narrowed else ANY
    if "properties" in schema:
        return frozenset({"object"})
    return frozenset({"array"}) if "items" in schema else ANY


def resolve(reference: str, root: Mapping[str, Any]) -> object:
    """What a reference into the same schema (`#/$defs/Name`) points at; None for any other."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    target: object = root
    for part in reference[1:].split("/")[1:]:
        if not isinstance(target, Mapping):
            return None
        target = target.get(part.replace("~1", "/").replace("~0", "~"))
    return target


def type_of(value: object) -> str:
    """The name of a JSON value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
