"""The fields that ask for an answer of a certain form: OpenAI's response_format, and vLLM's.

It does not know grammars: chat/structured.py makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from mlxd.api.openai.schema import GenerationFields
from mlxd.chat import structured
from mlxd.chat.structured import StructuredOutput
from mlxd.errors import InvalidRequestError

Reader = Callable[[Any, str], StructuredOutput]


def read_structured_output(fields: GenerationFields) -> StructuredOutput | None:
    """What the answer must be; None where it may be any text.

    Raises:
        InvalidRequestError: two fields ask for something, a form that is not known or not valid, or one that
            `ignore_eos` contradicts.
    """
    asked = [
        output
        for name, read in _READERS.items()
        if (value := getattr(fields, name)) is not None and (output := read(value, name)) is not None
    ]
    if len(asked) > 1:
        raise _invalid(asked[1].param, f"{asked[0].param} asks for a form already")
    if asked and fields.ignore_eos:
        raise _invalid("ignore_eos", f"an answer to {asked[0].param} must be able to end")
    return asked[0] if asked else None


def _response_format(value: Any, param: str) -> StructuredOutput | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return structured.json_schema(structured.ANY_OBJECT, param)
    if kind != "json_schema":
        raise _invalid(f"{param}.type", "expected text, json_object or json_schema")
    described = value.get("json_schema")
    if not isinstance(described, dict) or "schema" not in described:
        raise _invalid(f"{param}.json_schema.schema", "missing")
    return structured.json_schema(described["schema"], f"{param}.json_schema.schema")


def _structured_outputs(value: Any, param: str) -> StructuredOutput | None:
    if not isinstance(value, dict):
        raise _invalid(param, f"expected an object with one of {', '.join(_KINDS)}")
    given = {key: asked for key, asked in value.items() if asked is not None and asked is not False}
    for key in given.keys() - _KINDS.keys():
        raise _invalid(f"{param}.{key}", f"not supported; there are {', '.join(_KINDS)}")
    if len(given) > 1:
        raise _invalid(param, f"only one of {', '.join(given)} can be asked for")
    for key, asked in given.items():
        return _KINDS[key](asked, f"{param}.{key}")
    return None


def _json(value: Any, param: str) -> StructuredOutput:
    """A schema, or the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise _invalid(param, f"not JSON: {error}") from error
    return structured.json_schema(value, param)


def _json_object(value: Any, param: str) -> StructuredOutput:
    if value is not True:
        raise _invalid(param, "expected true or false")
    return structured.json_schema(structured.ANY_OBJECT, param)


_KINDS: dict[str, Reader] = {
    "json": _json,
    "json_object": _json_object,
    "regex": structured.regex,
    "choice": structured.choice,
    "grammar": structured.grammar,
}

_READERS: dict[str, Callable[[Any, str], StructuredOutput | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": structured.regex,
    "guided_choice": structured.choice,
    "guided_grammar": structured.grammar,
}


def _invalid(param: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {problem}", param=param)
