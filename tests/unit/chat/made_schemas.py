"""JSON schemas to hold a model to: as many as are wanted of any feature, and twenty tools with bounded ones.

It does not know grammars or models. Answers have bounds wherever a feature allows it, so that they end.
"""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema

from mlxd.chat.types import ToolSpec

WORD = {"type": "string", "maxLength": 8}
COUNT = {"type": "integer", "minimum": 0, "maximum": 999}
FORMATS = ("date-time", "date", "time", "email", "uri", "uuid", "ipv4", "ipv6", "hostname", "duration")
PATTERNS = ("^[a-z]{1,6}$", "^(on|off)$", "^[A-Z][0-9]{2}-[a-f]+$", "x{2}", r"^\d{3}$", "^#[0-9a-f]{6}$")
NAMES = ["id", "name", "tags", "x-y", "größe", "a b", "$ref_", "n"]
LITERALS: list[Any] = ["red", "a b", "", "é", 0, -3, 2.5, True, None, [1, "x"], {"k": [None]}]


class Maker:
    """Makes schemas from a source of randomness, with every feature that is enforced."""

    def __init__(self, source: random.Random) -> None:
        self._random = source

    def schema(self) -> dict[str, Any]:
        made = self._random.choice([self._object, self._object, self._object, self._array, self._recursive])(
            0
        )
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Made up", **made}

    def _any(self, depth: int) -> dict[str, Any]:
        leaves = [self._integer, self._number, self._text, self._enumeration, self._constant, self._simple]
        inner = [self._object, self._array, self._tuple, self._alternatives, self._map]
        return self._random.choice(leaves + (inner if depth < 2 else []))(depth + 1)

    def _integer(self, depth: int) -> dict[str, Any]:
        low = self._random.randint(-200, 200)
        schema: dict[str, Any] = {"type": "integer"}
        schema[self._random.choice(["minimum", "exclusiveMinimum"])] = low
        schema[self._random.choice(["maximum", "exclusiveMaximum"])] = low + self._random.randint(20, 5000)
        if self._random.random() < 0.2:
            schema["multipleOf"] = self._random.choice([2, 5, 7])
        return schema

    def _number(self, depth: int) -> dict[str, Any]:
        low = self._random.choice([-1.5, 0, 0.25, 10])
        return {"type": "number", "minimum": low, "maximum": low + self._random.choice([0.5, 3, 1000])}

    def _text(self, depth: int) -> dict[str, Any]:
        kind = self._random.random()
        if kind < 0.3:
            return {"type": "string", "format": self._random.choice(FORMATS)}
        if kind < 0.6:
            return {
                "type": "string",
                "pattern": self._random.choice(PATTERNS),
                "maxLength": 12,
            }
        low = self._random.randint(0, 3)
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randint(0, 12)}

    def _enumeration(self, depth: int) -> dict[str, Any]:
        return {"enum": self._random.sample(LITERALS, self._random.randint(1, 5))}

    def _constant(self, depth: int) -> dict[str, Any]:
        return {"const": self._random.choice(LITERALS)}

    def _simple(self, depth: int) -> dict[str, Any]:
        return self._random.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(NAMES, self._random.randint(0, 4))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._random.random() < 0.6],
            "additionalProperties": False,
        }
        if self._random.random() < 0.2:
            schema["description"] = "What it is."
            schema["minProperties"] = len(schema["required"])
        if self._random.random() < 0.1:
            return {"allOf": [schema, {"type": "object"}]}
        return schema

    def _map(self, depth: int) -> dict[str, Any]:
        if self._random.random() < 0.5:
            return {"type": "object", "additionalProperties": self._any(depth), "maxProperties": 2}
        return {
            "type": "object",
            "patternProperties": {"^[a-c]{1,3}$": self._any(depth)},
            "additionalProperties": False,
            "maxProperties": 3,
        }

    def _array(self, depth: int) -> dict[str, Any]:
        low = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self._any(depth),
            "minItems": low,
            "maxItems": low + self._random.randint(0, 2),
        }

    def _tuple(self, depth: int) -> dict[str, Any]:
        count = self._random.randint(1, 3)
        items = [self._any(depth) for _ in range(count)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": count}

    def _alternatives(self, depth: int) -> dict[str, Any]:
        if self._random.random() < 0.5:
            return {"anyOf": [self._any(depth), self._any(depth)]}
        kinds = [
            {"properties": {"kind": {"const": kind}, "value": self._any(depth)}, "required": ["kind"]}
            for kind in ("a", "b")
        ]
        return {"oneOf": [{"type": "object", "additionalProperties": False, **kind} for kind in kinds]}

    def _recursive(self, depth: int) -> dict[str, Any]:
        node = {
            "type": "object",
            "properties": {
                "value": self._any(depth),
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def problems(schema: dict[str, Any], text: str) -> list[str]:
    """What keeps a JSON text from being valid, formats included."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    return [error.message for error in validator.iter_errors(json.loads(text))]


def record(properties: dict[str, Any], **keywords: Any) -> dict[str, Any]:
    required = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **keywords,
    }


SCHEMAS: list[dict[str, Any]] = [
    {},
    record({}),
    record({"city": WORD}),
    record({"a": COUNT, "b": COUNT}),
    record({"unit": {"enum": ["c", "f"]}, "city": WORD}),
    record({"tags": {"type": "array", "items": WORD, "maxItems": 3}}),
    record({"on": {"type": "boolean"}}),
    record({"day": {"type": "string", "format": "date"}}),
    record({"point": record({"x": {"type": "integer", "minimum": -5, "maximum": 5}, "y": COUNT})}),
    record({"mail": {"type": "string", "pattern": "^[a-z]{2,5}@[a-z]{2,5}\\.com$"}}),
    record({"value": {"anyOf": [COUNT, {"type": "null"}]}}),
    record({"kind": {"const": "fixed"}, "n": COUNT}),
    record({"q": WORD, "limit": COUNT}, required=["q"]),
    record({"rows": {"type": "array", "items": record({"id": COUNT}), "minItems": 1, "maxItems": 2}}),
    record({"id": {"type": "string", "format": "uuid"}}),
    record({"note": {"type": ["string", "null"], "maxLength": 5}}),
    record({"x": {"$ref": "#/$defs/c"}}, **{"$defs": {"c": {"enum": ["red", "blue"]}}}),
    record({"z": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50}}),
    record({"w": {"type": "string", "minLength": 2, "maxLength": 4}}),
    record({"pair": {"type": "array", "prefixItems": [COUNT, WORD], "items": False, "minItems": 2}}),
]
TOOLS = [ToolSpec(name=f"tool_{i}", parameters=schema) for i, schema in enumerate(SCHEMAS)]
