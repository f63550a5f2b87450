"""Takes a JSON schema apart: the forms that a value may have, what stands in objects and arrays.

It does not know how values are written. What it returns says all that the schema says, or more: it may allow
less than the schema does (keys that are not named, where others are), never more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlxd.chat.string_patterns import Inexpressible
from mlxd.chat.tool_parsers.schema import resolve, type_of

MAX_STEPS = 20_000
"""Subschemas that are looked at, for one tool: references can make many of few."""
MAX_DEPTH = 32
"""How deep references and alternatives may stand in each other before they are taken for endless."""

_ANNOTATIONS = frozenset(
    re.findall(
        r"\S+",
        "title description default examples example deprecated readOnly writeOnly nullable discriminator "
        "$comment $schema $id $anchor $defs definitions",
    )
)
_KEYWORDS: dict[str, frozenset[str]] = {
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    "object": frozenset(("properties", "required", "additionalProperties", "minProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems", "uniqueItems")),
    "boolean": frozenset(),
    "null": frozenset(),
}
_KEYWORDS["integer"] = _KEYWORDS["number"]
_UNTYPED = ("object", "array")
"""the types that their keywords give away, where none is named"""


class Form(NamedTuple):
    """One of the forms of a value: `kind` is a JSON type, "const" (it is `constant`), or "any".

    `schema` is the one that says so; of its keywords, only those of the kind are its.
    """

    kind: str
    schema: Mapping[str, Any]
    constant: Any = None

    def keywords(self) -> dict[str, Any]:
        """What the schema says of values of this type."""
        own = _KEYWORDS.get(self.kind, frozenset())
        return {key: value for key, value in self.schema.items() if key in own}


class Member(NamedTuple):
    """A property of an object."""

    name: str
    schema: Any
    is_required: bool


class Items(NamedTuple):
    """What stands in an array: the first ones, all others (None: there are none), least and most number."""

    first: Sequence[Any]
    others: Any
    least: int
    most: int | None


class SchemaForms:
    """Reads one schema and what it refers to within `root`; every method raises Inexpressible."""

    __slots__ = ("_num_steps", "_root")

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._num_steps = 0

    def of(self, schema: Any, depth: int = 0) -> list[Form]:
        """The forms of a value; none where nothing is valid."""
        self._num_steps += 1
        if self._num_steps > MAX_STEPS or depth > MAX_DEPTH:
            raise Inexpressible("a schema of that size")
        if isinstance(schema, bool):
            return [Form("any", {})] if schema else []
        if not isinstance(schema, Mapping):
            raise Inexpressible("a schema that is no object")
        declared = schema.get("type")
        types = declared if isinstance(declared, list) else [declared]
        if not all(isinstance(kind, str | None) for kind in types):
            raise Inexpressible("a type that is no name")
        keys = schema.keys() - _ANNOTATIONS
        if not keys:
            return [Form("any", schema)]
        combined = self._combined(schema, keys - {"type"}, depth)
        if combined is None:
            return self._typed(schema, keys)
        declared = schema.get("type")
        if declared is None:
            return combined
        types = declared if isinstance(declared, list) else [declared]
        if any(form.kind == "any" for form in combined):
            raise Inexpressible("anything, but of one type")
        return [form for form in combined if _is_of(_type(form), types)]

    def members(self, form: Form) -> tuple[list[Member], Any]:
        """The properties of an object, and the schema of all others; None where there are no others."""
        schema = form.keywords()
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if (
            not isinstance(properties, Mapping)
            or not isinstance(required, list)
            or not all(isinstance(name, str) for name in required)
        ):
            raise Inexpressible("properties of that kind")
        others = schema.get("additionalProperties", "properties" not in schema)
        others = None if others is False else others
        if set(required) - properties.keys():
            raise Inexpressible("a required property that is not described")
        least = schema.get("minProperties", 0)
        if not isinstance(least, int) or least > len(set(required)):
            raise Inexpressible("minProperties")
        members = [
            Member(name, value, name in required)
            for name, value in properties.items()
            if value is not False or name in required
        ]
        return members, others

    def items(self, form: Form) -> Items:
        """What stands in an array."""
        schema = form.keywords()
        first, others = schema.get("prefixItems", []), schema.get("items", True)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if not isinstance(first, list) or isinstance(others, list) or schema.get("uniqueItems"):
            raise Inexpressible("items of that kind")
        others = None if others is False else others
        if others is None:
            most = min(len(first), len(first) if most is None else most)
        if not isinstance(least, int) or not isinstance(most, int | None):
            raise Inexpressible("numbers of items")
        if most is not None and least > most:
            raise Inexpressible("an array that cannot be")
        return Items(first, others, least, most)

    def _combined(self, schema: Mapping[str, Any], keys: set[str], depth: int) -> list[Form] | None:
        """The forms of a schema that refers to others; None for one that does not."""
        if keys == {"$ref"}:
            return self.of(resolve(str(schema["$ref"]), self._root), depth + 1)
        for key in ("allOf", "anyOf", "oneOf"):
            if keys == {key} and isinstance(parts := schema[key], list):
                if key == "allOf" and len(parts) != 1:
                    raise Inexpressible("allOf")
                ways = [self.of(part, depth + 1) for part in parts]
                if key == "oneOf" and not self._are_apart(ways):
                    raise Inexpressible("oneOf whose parts may hold together")
                return [form for way in ways for form in way]
        return None

    def _typed(self, schema: Mapping[str, Any], keys: set[str]) -> list[Form]:
        declared = schema.get("type")
        if declared is None:
            types = [kind for kind in _UNTYPED if keys <= _KEYWORDS[kind]]
        else:
            types = declared if isinstance(declared, list) else [declared]
        for key in ("enum", "const"):
            if key in keys and keys <= {key, "type"}:
                values = schema[key] if key == "enum" else [schema[key]]
                if not isinstance(values, list):
                    raise Inexpressible("an enum that is no array")
                return [
                    Form("const", schema, value)
                    for value in values
                    if declared is None or _is_of(type_of(value), types)
                ]
        allowed = {"type"}.union(*(_KEYWORDS.get(str(kind), ()) for kind in types))
        if not types or not all(kind in _KEYWORDS for kind in types) or not keys <= allowed:
            raise Inexpressible(f"{', '.join(sorted(keys - {'type'})) or 'this type'}")
        # A number may be an integer.
        return [Form(kind, schema) for kind in types if kind != "integer" or "number" not in types]

    def _are_apart(self, ways: Sequence[list[Form]]) -> bool:
        """Whether no value has a form of two of these."""
        self._num_steps += len(ways) ** 2
        if self._num_steps > MAX_STEPS:
            raise Inexpressible("a schema of that size")
        return all(
            self._differ(a, b) for i, way in enumerate(ways) for other in ways[:i] for a in way for b in other
        )

    def _differ(self, a: Form, b: Form) -> bool:
        kinds = {_type(a), _type(b)}
        if "any" in kinds:
            return False
        if len(kinds) == 2:
            return kinds != {"integer", "number"}
        if a.kind == b.kind == "const":
            return bool(a.constant != b.constant)
        return kinds == {"object"} and a.kind == b.kind and self._have_different_tags(a, b)

    def _have_different_tags(self, a: Form, b: Form) -> bool:
        """Whether a property that both objects must have is a constant, another one in each."""
        tags: list[dict[str, list[Any]]] = []
        for form in (a, b):
            found = {
                member.name: self.of(member.schema)
                for member in self.members(form)[0]
                # No others: they may lead back here.
                if member.is_required
                and isinstance(member.schema, Mapping)
                and member.schema.keys() & {"const", "enum"}
            }
            tags.append(
                {
                    name: [form.constant for form in forms]
                    for name, forms in found.items()
                    if all(form.kind == "const" for form in forms)
                }
            )
        ours, theirs = tags
        return any(
            all(value != other for value in ours[name] for other in theirs[name])
            for name in ours.keys() & theirs.keys()
        )


def _type(form: Form) -> str:
    return type_of(form.constant) if form.kind == "const" else form.kind


def _is_of(kind: str, types: Sequence[object]) -> bool:
    """Whether values of a type are of one of these."""
    return kind in types or (kind == "integer" and "number" in types)
