"""What a JSON schema says of a string, as a terminal of Lark: for formats that write strings without quotes.

It does not know where the string stands. JSON's own strings are llguidance's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxd.chat.lark import quoted


class Inexpressible(ValueError):
    """The schema asks for something that cannot be written as a grammar here."""


MAX_LENGTH = 1_000_000
"""No string of a call is longer, so that a larger limit is none."""

_YEAR = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_DAYS_28, _DAYS_30 = "(0[1-9]|1[0-9]|2[0-8])", "(0[1-9]|[12][0-9]|30)"
_MONTH_DAY = f"((0[13578]|1[02])-({_DAYS_30}|31)|(0[469]|11)-{_DAYS_30}|02-{_DAYS_28})"  # but for leap days
_DATE = f"({_YEAR}-{_MONTH_DAY}|([0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
_HOUR_MINUTE = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_MINUTE}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_HOUR_MINUTE})"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_GROUP = "[0-9a-fA-F]{1,4}"
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,29}[a-zA-Z0-9])?"
_HOSTNAME = rf"({_LABEL}\.){{0,7}}{_LABEL}"
_PERIOD = "(Y([0-9]+M([0-9]+D)?)?|M([0-9]+D)?|D)"
_CLOCK = "T[0-9]+(H([0-9]+M([0-9]+S)?)?|M([0-9]+S)?|S)"
_URL_CHARACTER = r"([a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
# At most seven of an address's eight groups stand beside its "::".
_SHORT_IPV6 = "|".join(
    f"({_GROUP}(:{_GROUP}){{{number}}})?::({_GROUP}(:{_GROUP}){{0,{5 - number}}})?" for number in range(6)
)
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": rf"P([0-9]+W|[0-9]+{_PERIOD}({_CLOCK})?|{_CLOCK})",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": f"({_GROUP}(:{_GROUP}){{7}}|{_SHORT_IPV6})",
    "hostname": _HOSTNAME,
    "email": rf"[a-zA-Z0-9_+-]+(\.[a-zA-Z0-9_+-]+)*@({_LABEL}\.){{1,7}}{_LABEL}",
    "uri": rf"[a-zA-Z][a-zA-Z0-9+.-]*:(//{_HOSTNAME}(:[0-9]{{1,5}})?(/{_URL_CHARACTER}*)*|{_URL_CHARACTER}+)"
    rf"(\?({_URL_CHARACTER}|[/?])*)?(#({_URL_CHARACTER}|[/?])*)?",
}
"""Patterns of formats: RFC 3339 and 9562, 2673, 4291, 1123, 5321, 3986; the usual of each, not all of it."""

_TOKENS = re.compile(r"\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)|\(\?(?:<?[=!:]|<\w+>)?|\[\^?\]?|.", re.DOTALL)
_CLASSES = {"\\d": "0-9", "\\w": "A-Za-z0-9_"}
_KEPT_ESCAPES = frozenset("sSDWnrtfvux")


def string_pattern(schema: Mapping[str, Any]) -> str | None:
    """The terminal of the strings that a schema allows by its length, pattern and format; None for any.

    Raises:
        Inexpressible: for a format that is not known here, an odd length, or a pattern with what a regular
            language lacks. Whether the terminal matches anything at all is not looked into.
    """
    parts: list[str] = []
    least, most = schema.get("minLength", 0), schema.get("maxLength", MAX_LENGTH)
    if not isinstance(least, int) or not isinstance(most, int) or not 0 <= least <= min(most, MAX_LENGTH):
        raise Inexpressible("lengths of a string")
    if least or most < MAX_LENGTH:
        parts.append(f"/(?s:.{{{least},{most if most < MAX_LENGTH else ''}}})/")
    if "pattern" in schema:
        parts.append(f"/{_searched(schema['pattern'])}/")
    if "format" in schema:
        known = _FORMATS.get(str(schema["format"]))
        if known is None:
            raise Inexpressible(f"the format {schema['format']!r}")
        parts.append(f"/{known.replace('/', chr(92) + '/')}/")
    return " & ".join(parts) or None


def _searched(pattern: Any) -> str:
    """In Rust's syntax, the texts in which an ECMA 262 pattern is found somewhere."""
    if not isinstance(pattern, str):
        raise Inexpressible("a pattern that is no text")
    branches: list[str] = []
    words: list[str] = []
    begins = ends = in_class = False
    depth = 0

    def end_branch() -> None:
        before, after = ("" if anchored else "(?s:.*)" for anchored in (begins, ends))
        branches.append(f"{before}({''.join(words)}){after}")

    tokens: list[str] = _TOKENS.findall(pattern)
    for i, token in enumerate(tokens):
        if ends and (token != "|" or depth):
            raise Inexpressible("a pattern with an anchor in the middle")
        if token[0] == "\\":
            words.append(_escape(token, in_class))
        elif in_class:
            in_class = token[-1] != "]"
            beside = (tokens[i - 1], *tokens[i + 1 : i + 2])
            if token == "-" and tokens[i - 1] == "-":
                raise Inexpressible("a pattern with two dashes in a class")
            if token == "-" and any(each[0] == "\\" and each[1:] in tuple("dDsSwW") for each in beside):
                token = "\\-"  # no range
            words.append("\\" + token if token[0] in "[&~/" else token)
        elif token[0] == "[":
            if token[-1] == "]":
                raise Inexpressible("a pattern with an empty class")
            in_class = True
            words.append(token)
        elif token[0] == "(":
            if token not in ("(", "(?:") and not token.endswith(">"):
                raise Inexpressible("a pattern that looks around")
            depth += 1
            words.append("(")
        elif token == "|" and not depth:
            end_branch()
            words, begins, ends = [], False, False
        elif token == "^" and not words and not depth and not begins:
            begins = True
        elif token == "$" and not depth:
            ends = True
        elif token in "^$":
            raise Inexpressible("a pattern with an anchor in the middle")
        elif token == "?" and i and tokens[i - 1] in tuple("*+?}"):
            pass  # lazy or not, it finds the same texts
        else:
            depth -= token == ")"
            words.append(token if token in "()|*+?{},.-" else quoted(token))
    if depth or in_class:
        raise Inexpressible("a pattern that is not closed")
    end_branch()
    return "|".join(branches)


def _escape(token: str, in_class: bool) -> str:
    if token in _CLASSES:
        return _CLASSES[token] if in_class else f"[{_CLASSES[token]}]"
    if token[1] in _KEPT_ESCAPES:
        return token
    if token[1].isalnum():
        raise Inexpressible(f"{token} in a pattern")
    return quoted(token[1]) if token[1] not in "]^-\\" else token
