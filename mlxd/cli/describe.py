"""Words for values and types in error messages: what was read, and what is allowed.

It does not know where either comes from. Types are those that mlxd.config uses.
"""

from __future__ import annotations

from typing import Any

MAX_SHOWN_CHARACTERS = 60


def shown(value: object, *, hide: bool = False) -> str:
    """`value` as a user would have written it, cut to a line. `hide`: it may hold a secret."""
    if hide:
        return "this value"
    if value is None:
        text = "null"
    else:
        text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"


def allowed(kind: object) -> str:
    """What a type takes: `an integer from 0 to 65535`, `text or float32, float16 or null`, …"""
    import msgspec.inspect  # costs 10 ms, and only errors need it

    return _allowed(msgspec.inspect.type_info(kind))


def _allowed(info: Any) -> str:
    import msgspec.inspect as inspect

    match info:
        case inspect.UnionType():
            return " or ".join(_allowed(part) for part in info.types)
        case inspect.NoneType():
            return "null"
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType():
            return "one of " + ", ".join(str(value) for value in info.values)
        case inspect.IntType():
            return "an integer" + _range(info)
        case inspect.FloatType():
            return "a number" + _range(info)
        case _:
            return "text"


def _range(info: Any) -> str:
    if info.ge is not None and info.le is not None:
        return f" from {info.ge:g} to {info.le:g}"
    bounds = [("above", info.gt), ("of at least", info.ge), ("below", info.lt), ("of at most", info.le)]
    words = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
    return " " + " and ".join(words) if words else ""
