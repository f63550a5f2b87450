"""Grammars for what an answer must be: JSON, a JSON schema, a pattern, one of some texts, a grammar given.

It does not know requests, tokens or models. llguidance compiles and enforces them in the worker; what it
would not enforce is refused here, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from mlxd.chat.lark import literal
from mlxd.errors import InvalidRequestError
from mlxd.step import MAX_FORCED_BYTES

Grammar = Mapping[str, Any]
"""One of llguidance's: {"lark_grammar": text} or {"json_schema": schema}."""

# Unbounded white space is where small models get lost.
WHITESPACE_PATTERN = r"\n?[ \t]{0,40}"

ANY_OBJECT: dict[str, Any] = {"type": "object"}

_BYTES = LLTokenizer("byte")
"""Every byte a token: for what can be told of a grammar without the model's."""
_FITS_NOTHING = "NoExtensionBias"
"""llguidance's word for a place at which no token is allowed."""
MAX_FOLLOWED_BYTES = 1024
"""of a grammar that forces so many: llguidance holds the interpreter meanwhile, for a millisecond"""

_SUBSCHEMAS = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains")
_SUBSCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SUBSCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

# llguidance knows the shape of a date. That there is no year 0, when February has 29 days, that seconds go
# up to 59 (leap seconds are some moments, which no calendar reads) must be said besides.
_YEAR = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_DATE = (
    f"({_YEAR}-(02-([01][0-9]|2[0-8])|(0[13-9]|1[0-2])-[0-3][0-9])|([0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
)
_TIME = "[0-9]{2}:[0-9]{2}:[0-5]"
_FORMAT_PATTERNS = {
    "date": f"^{_DATE}",
    "time": f"^{_TIME}",
    "date-time": f"^{_DATE}[tT]{_TIME}",
    "hostname": "^.{1,253}$",
}
"""By the format of a string: what else it must match."""

_NOT_ENFORCED = ("$recursiveRef", "disallow", "divisibleBy", "extends")
"""Assertions of older drafts that llguidance passes over. Newer ones that it lacks it refuses itself."""


_ESCAPE = re.compile(r"\\.", re.DOTALL)
_ASCII_CLASSES = {"\\d": "[0-9]", "\\D": "[^0-9]", "\\w": "[0-9A-Za-z_]", "\\W": "[^0-9A-Za-z_]"}
"""Rust's are all of Unicode's: a model that would rather not write a number finds a digit that looks like
none. ASCII's are what a JSON schema's patterns mean (ECMA 262), and what writers of patterns expect."""


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What an answer must be, and the request's field that says so."""

    grammar: Grammar
    param: str


def json_schema(schema: Any, param: str) -> StructuredOutput:
    """The JSON values that the schema allows.

    Raises:
        InvalidRequestError: it is no schema, or asks for what cannot be enforced (also raised by
            `compile_error`, later: much of it only compiling can tell).
    """
    if not isinstance(schema, dict | bool):
        raise InvalidRequestError(f"{param}: expected a JSON schema, an object", param=param)
    try:
        return StructuredOutput({"json_schema": enforceable(schema)}, param)
    except ValueError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param) from error


def regex(pattern: Any, param: str) -> StructuredOutput:
    """What a regular expression (Rust's syntax, ASCII's digits and words) matches from end to end."""
    text = _ESCAPE.sub(lambda escape: _ASCII_CLASSES.get(escape[0], escape[0]), _text(pattern, param))
    [grammar] = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
    return StructuredOutput(grammar, param)


def choice(texts: Any, param: str) -> StructuredOutput:
    """One of some texts."""
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequestError(f"{param}: expected a list of texts, none of them empty", param=param)
    alternatives = " | ".join(literal(text) for text in dict.fromkeys(texts))
    return StructuredOutput({"lark_grammar": f"start: {alternatives}"}, param)


def grammar(text: Any, param: str) -> StructuredOutput:
    """A grammar in Lark (llguidance's dialect) or GBNF (llama.cpp's): rules with `::=` are GBNF."""
    source = _text(text, param)
    try:
        lark = any_to_lark(source)
    except Exception as error:  # whatever the converter stumbles over
        raise InvalidRequestError(f"{param}: not a GBNF grammar: {error}", param=param) from error
    return StructuredOutput({"lark_grammar": lark}, param)


def compose(start: str, parts: Mapping[str, Grammar]) -> str:
    """llguidance's text: `start` is the body of the start rule, in Lark, and calls the parts `@name`."""
    named = [{**part, "name": name} for name, part in parts.items()]
    return json.dumps({"grammars": [{"name": "main", "lark_grammar": f"start: {start}"}, *named]})


def compile_error(text: str) -> str | None:
    """What is wrong with a grammar, in words for the client; None where nothing is.

    It may take long, and releases the interpreter.
    """
    is_error, messages = LLMatcher.validate_grammar_with_warnings(text)
    if is_error:
        return str(messages[0])[:1000]
    matcher = _byte_matcher(text)
    return None if matcher.is_error() else _beginning_error(matcher)  # some name tokens of the model's


def is_possible(terminal: str) -> bool:
    """Whether any text matches a terminal of Lark. It takes a millisecond or more."""
    grammar = {"grammars": [{"lark_grammar": f"start: T\nT: {terminal}"}]}
    return _beginning_error(_byte_matcher(json.dumps(grammar))) is None


def _byte_matcher(grammar: str) -> LLMatcher:
    """With the worker's limits, over single bytes."""
    limits = LLParserLimits(verbose_errors=False)
    return LLMatcher(_BYTES, grammar, log_level=0, limits=limits)


def _beginning_error(matcher: LLMatcher) -> str | None:
    """Why a text cannot get past where the grammar first leaves a choice; None where it can.

    Some grammars fit no text, or are too large from a place on, which compiling does not tell. Where the
    choice lies behind MAX_FOLLOWED_BYTES, the worker is left to tell.
    """
    matcher.compute_bitmask()
    if not matcher.is_error():
        num_forced = len(matcher.compute_ff_bytes())
        if num_forced > MAX_FORCED_BYTES:
            return (
                f"no choice is left about the first {num_forced} bytes; at most {MAX_FORCED_BYTES} may be so"
            )
        if num_forced > MAX_FOLLOWED_BYTES:
            return None
        matcher.consume_tokens(matcher.compute_ff_tokens())
        matcher.compute_bitmask()
    if not matcher.is_error():
        return None
    error = str(matcher.get_error()).partition("\n")[0]
    return "nothing fits it" if error.startswith(_FITS_NOTHING) else error


def enforceable(schema: dict[str, Any] | bool) -> dict[str, Any] | bool:
    """The schema as llguidance takes it, less what it need not be told.

    ValueError, naming the keyword: something that nobody would enforce.
    """
    if isinstance(schema, bool):
        return schema
    if "x-guidance" in schema:
        raise ValueError("x-guidance is not a keyword of JSON schema")
    return {**_lowered(schema), "x-guidance": {"whitespace_pattern": WHITESPACE_PATTERN}}


def _lowered(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    for keyword in _NOT_ENFORCED:
        if keyword in schema:
            raise ValueError(f"the keyword {keyword!r} is not supported")
    changed = {key: _lowered_keyword(key, value) for key, value in schema.items()}
    if changed.get("uniqueItems") is False:
        del changed["uniqueItems"]
    pattern = _FORMAT_PATTERNS.get(str(changed.get("format")))
    others = changed.get("allOf", [])
    if pattern is not None and isinstance(others, list):
        changed["allOf"] = [*others, {"pattern": pattern}]
    # llguidance counts a key that comes twice as two, which it is not for who reads the object.
    least, required = changed.get("minProperties"), changed.get("required", ())
    if isinstance(least, int) and isinstance(required, Sequence):
        if least > max(1, len(set(map(str, required)))):
            raise ValueError(f"minProperties {least} is more than the number of required properties")
        if least <= len(set(map(str, required))):
            del changed["minProperties"]
    return changed


def _lowered_keyword(key: str, value: Any) -> Any:
    if key in _SUBSCHEMA_MAPS and isinstance(value, dict):
        return {name: _lowered(part) for name, part in value.items()}
    if key in _SUBSCHEMA_LISTS and isinstance(value, list):
        return [_lowered(part) for part in value]
    return _lowered(value) if key in _SUBSCHEMAS else value


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{param}: expected a text, not an empty one", param=param)
    return value
