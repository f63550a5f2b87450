"""Makes rules of Lark from a JSON schema, for values that are not, or not only, JSON.

It does not know where the values stand. Two notations: JSON in which some texts must not stand, because a
parser takes them for the value's end, and Gemma's, with keys and strings of its own. Properties come in the
order in which a model of the family writes them.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from mlxd.chat.lark import LarkText, literal, one_of, without
from mlxd.chat.schema_forms import Form, Member, SchemaForms
from mlxd.chat.string_patterns import Inexpressible, string_pattern

T = TypeVar("T")
MAX_DEPTH = 64
"""Values in values, less what a schema says of itself."""

INTEGER = "/-?(0|[1-9][0-9]*)/"
NUMBER = r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?/"
_WORDS = {"boolean": '"true" | "false"', "null": '"null"'}
_ANY = tuple(Form(kind, {}) for kind in ("string", "number", "boolean", "null", "array", "object"))
_PLAIN_KEY = re.compile(r"\w(?:[\w .$@/-]*[\w.$@/-])?")


class SchemaRules(ABC):
    """The rules of one grammar: `value` adds what it needs and returns the body of a rule."""

    comma: str
    opening: str
    closing: str
    """as an object has them, and an array likewise with its brackets"""

    def __init__(self, forms: SchemaForms, text: LarkText) -> None:
        self.forms = forms
        self.text = text
        self.doubtful: list[str] = []
        """terminals that might match nothing at all: a grammar with such a one would have no way on"""
        self._rules: dict[str, str] = {}
        self._terminals: dict[str, str] = {}
        self._places: dict[tuple[str, int], str] = {}
        self._bodies: dict[str, str] = {}
        """of the rules of places"""
        self._depth = 0

    def lark(self, start: str) -> str:
        """The grammar: `start` is the body of its first rule."""
        rules = [(name, body) for body, name in (*self._rules.items(), *self._terminals.items())]
        rules += self._bodies.items()
        return "\n".join([f"start: {start}", *(f"{name}: {body}" for name, body in rules)])

    def value(self, schema: Any) -> str:
        """A value of a schema. Raises Inexpressible, also where nothing is valid."""
        return self.values(self.forms.of(schema))

    def values(self, forms: Iterable[Form]) -> str:
        """A value of one of these forms."""
        ways = [way for form in forms if (way := self.form(form))]
        if not ways:
            raise Inexpressible("a schema that allows nothing")
        return f"({' | '.join(dict.fromkeys(ways))})"

    def form(self, form: Form) -> str:
        """A value of one form; "" where it cannot be written."""
        match form.kind:
            case "const":
                return self.constant(form.constant)
            case "string":
                return self.string(string_pattern(form.keywords()))
            case "integer" | "number" if form.keywords():
                schema = {**form.keywords(), "type": form.kind}
                return self.named(f"%json {json.dumps(schema)}", "number")
            case "integer":
                return self.terminal(INTEGER)
            case "number":
                return self.terminal(NUMBER)
            case "boolean" | "null":
                return _WORDS[form.kind]
            case _:
                return self._nested(form)

    @abstractmethod
    def string(self, pattern: str | None) -> str:
        """A string; `pattern` is a terminal that it matches."""

    @abstractmethod
    def constant(self, value: Any) -> str:
        """This very value; "" where it cannot be written."""

    @abstractmethod
    def key(self, name: str) -> str:
        """A property's name, with its colon."""

    @abstractmethod
    def other_key(self, names: Sequence[str]) -> str:
        """Any name but these, with its colon."""

    def ordered(self, members: list[Member]) -> list[Member]:
        """Properties in the order in which they come."""
        return members

    def tried(self, make: Callable[[], T]) -> T:
        """What `make` returns; where that raises Inexpressible, as if it had not been called."""
        dicts = (self._rules, self._terminals, self._places, self._bodies)
        kept, doubtful, depth = [dict(each) for each in dicts], list(self.doubtful), self._depth
        try:
            return make()
        except Inexpressible:
            self._rules, self._terminals, self._places, self._bodies = kept  # type: ignore[assignment]
            self.doubtful, self._depth = doubtful, depth
            raise

    def named(self, body: str, kind: str) -> str:
        """A rule's name."""
        return self._rules.setdefault(body, f"{kind}_{len(self._rules)}")

    def terminal(self, body: str, *, is_doubtful: bool = False) -> str:
        """A terminal's name."""
        if is_doubtful:
            self.doubtful.append(body)
        return self._terminals.setdefault(body, f"T{len(self._terminals)}")

    def _nested(self, form: Form) -> str:
        """The name of an object's rule, or an array's: one for each place in the schema that describes it."""
        place = (form.kind, id(form.schema) if form.schema else 0)
        known = self._places.get(place)
        if known is not None:
            return known
        name = self._places[place] = f"place_{len(self._places)}"
        if self._depth >= MAX_DEPTH:
            raise Inexpressible("a schema of that depth")
        self._depth += 1
        if form.kind == "any":
            body = self.values(_ANY)
        else:
            body = self._object(form) if form.kind == "object" else self._array(form)
        self._depth -= 1
        self._bodies[name] = body
        return name

    def _object(self, form: Form) -> str:
        members, others = self.forms.members(form)
        members = self.ordered(members)
        # From the end: what may come once a property has come, and what may before.
        later, sooner = "", ""
        if others is not None:
            other = self.named(f"{self.other_key([m.name for m in members])} {self.value(others)}", "other")
            later = self.named(f"({self.comma} {other})*", "rest")
            sooner = self.named(f"({other} {later})?", "head")
        for member in reversed(members):
            own = self.named(f"{self.key(member.name)} {self.value(member.schema)} {later}", "property")
            if member.is_required:
                later, sooner = self.named(f"{self.comma} {own}", "rest"), own
            else:
                later = self.named(_or(f"{self.comma} {own}", later), "rest")
                sooner = self.named(_or(own, sooner), "head")
        return f"{self.opening} {sooner} {self.closing}"

    def _array(self, form: Form) -> str:
        first, others, least, most = self.forms.items(form)
        rest = ""
        if others is not None and (most is None or most > len(first)):
            other = self.value(others)
            bounds = max(0, least - len(first)), None if most is None else most - len(first)
            if not first:
                inner = _counted(f"{self.comma} {other}", bounds[0] - 1, None if most is None else most - 1)
                inner = f"{other} {inner}"
                return self._in_brackets(inner if least else f"({inner})?")
            rest = _counted(f"{self.comma} {other}", *bounds)
        for i in reversed(range(len(first) if most is None else min(most, len(first)))):
            item = f"{self.comma if i else ''} {self.value(first[i])} {rest}"
            rest = item if i < least else f"({item})?"
        return self._in_brackets(rest)

    def _in_brackets(self, inner: str) -> str:
        opening, closing = self.opening.replace("{", "["), self.closing.replace("}", "]")
        return f"{opening} {inner} {closing}"


def _or(body: str, other: str) -> str:
    """`body` or the other thing, which may be nothing."""
    return f"{body} | {other}" if other else f"({body})?"


def _counted(body: str, least: int, most: int | None) -> str:
    """`body` so many times."""
    return f"({body}){{{max(0, least)},{'' if most is None else most}}}"


class JsonRules(SchemaRules):
    """JSON in which some texts do not stand."""

    comma, opening, closing = 'space? "," space?', '"{" space?', 'space? "}"'

    _STRING = r'/"([^"\\\x00-\x1f\x7f]|\\["\\\/bfnrt]|\\u[0-9a-cA-CefEF][0-9a-fA-F]{3})*"/'

    def __init__(self, forms: SchemaForms, text: LarkText, excluded: Sequence[str]) -> None:
        """`excluded` are the texts that do not stand in it."""
        super().__init__(forms, text)
        self._excluded = excluded
        self._rules[r"/\n[ \t]{0,40}|[ \t]{1,40}/"] = "space"

    def string(self, pattern: str | None) -> str:
        body = self._STRING
        if pattern is not None:  # with nothing in it that must be escaped
            body = rf'"\"" (({pattern}) & /[^"\\\x00-\x1f\x7f]*/) "\""'
        return self.terminal(f"({body}) & {without(self._excluded)}", is_doubtful=pattern is not None)

    def constant(self, value: Any) -> str:
        written = json.dumps(value, ensure_ascii=False)
        return "" if any(text in written for text in self._excluded) else literal(written)

    def key(self, name: str) -> str:
        if not (written := self.constant(name)):
            raise Inexpressible("a property of that name")
        return f'{written} space? ":" space?'

    def other_key(self, names: Sequence[str]) -> str:
        body = f"({self._STRING}) & {without(self._excluded)}"
        if names:
            body += f" & ~{one_of(json.dumps(name, ensure_ascii=False) for name in names)}"
        return f'{self.terminal(body)} space? ":" space?'


class GemmaRules(SchemaRules):
    """Gemma's notation: keys without quotes, strings between tags, properties sorted by name."""

    comma, opening, closing = '","', '"{"', '"}"'

    def __init__(self, forms: SchemaForms, text: LarkText, quote: str) -> None:
        """`quote` is the tag."""
        super().__init__(forms, text)
        self._quote = quote

    def string(self, pattern: str | None) -> str:
        body = without([self._quote]) if pattern is None else f"({pattern}) & {without([self._quote])}"
        terminal, end = self.text.closed(body, self._quote)
        name = self.terminal(terminal, is_doubtful=pattern is not None)
        return f"{self.text.text(self._quote)} {name} {end}"

    def constant(self, value: Any) -> str:
        written = self._written(value)
        return "" if written is None else self.text.text(written)

    def key(self, name: str) -> str:
        return self.text.text(self._key(name) + ":")

    def other_key(self, names: Sequence[str]) -> str:
        body = r"/\w([\w .$@\/-]{0,62}[\w.$@\/-])?/"  # as _PLAIN_KEY
        if names:
            body += f" & ~{one_of(names)}"
        return f'{self.terminal(body)} ":"'

    def ordered(self, members: list[Member]) -> list[Member]:
        return sorted(members, key=lambda member: member.name.lower())

    def _key(self, name: str) -> str:
        if _PLAIN_KEY.fullmatch(name):
            return name
        if self._quote in name:
            raise Inexpressible("a property of that name")
        return f"{self._quote}{name}{self._quote}"

    def _written(self, value: Any) -> str | None:
        match value:
            case str():
                return None if self._quote in value else f"{self._quote}{value}{self._quote}"
            case list():
                items = [self._written(item) for item in value]
                return None if None in items else f"[{','.join(map(str, items))}]"
            case dict():
                values = {self._key(key): self._written(item) for key, item in value.items()}
                if None in values.values():
                    return None
                return f"{{{','.join(f'{key}:{item}' for key, item in values.items())}}}"
            case _:
                return json.dumps(value)
