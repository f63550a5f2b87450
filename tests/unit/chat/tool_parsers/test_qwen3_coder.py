"""qwen3_coder: function tags with values as plain text; what formats of that kind owe to the same code."""

from __future__ import annotations

from typing import Any

from mlxd.chat.types import ToolSpec
from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

PARIS = "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>"
CALL = ("get_weather", {"city": "Paris"})


def search(**values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=search>\n{parameters}</function>\n</tool_call>"


def typed(id: str, schema: object, value: str, expected: Any, **root: Any) -> Case:
    """A call of a tool whose argument `x` has that schema."""
    tool = ToolSpec(name="f", parameters={"type": "object", "properties": {"x": schema}, **root})
    text = f"<function=f><parameter=x>{value}</parameter></function>"
    return Case(id, text, [("f", {"x": expected})], tools=[tool])


CASES = [
    Case("one", f"<tool_call>\n{PARIS}\n</tool_call>", [CALL], raw=['{"city": "Paris"}']),
    Case("no outer tag", f"I look it up.\n\n{PARIS}", [CALL], "I look it up."),
    Case("no outer opening tag", f"{PARIS}\n</tool_call>", [CALL], "</tool_call>"),
    Case("two in one tag", f"<tool_call>\n{PARIS}\n{PARIS}\n</tool_call>", [CALL, CALL]),
    Case("two tags", f"<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n{PARIS}\n</tool_call>", [CALL, CALL]),
    Case("prose around", f"A <tool_call>{PARIS}</tool_call> B", [CALL], "A B"),
    Case("no parameters", "<tool_call>\n<function=get_time>\n</function>\n</tool_call>", [("get_time", {})]),
    Case(
        "all types",
        search(query="a", limit="3", exact="true", tags='["x", "y"]', options='{"a": [1, null]}', zip="01"),
        [
            (
                "search",
                {
                    "query": "a",
                    "limit": 3,
                    "exact": True,
                    "tags": ["x", "y"],
                    "options": {"a": [1, None]},
                    "zip": "01",
                },
            )
        ],
    ),
    Case(
        "text that looks like JSON",
        search(query='{"a": 1}', zip="true"),
        [("search", {"query": '{"a": 1}', "zip": "true"})],
    ),
    Case(
        "null where allowed",
        search(limit="null", query="null"),
        [("search", {"limit": None, "query": "null"})],
    ),
    Case(
        "Python's words",
        search(limit="None", exact="False", tags="['a', 'b']", options="{'a': True}"),
        [("search", {"limit": None, "exact": False, "tags": ["a", "b"], "options": {"a": True}})],
    ),
    Case("of a union the text's own type", search(page="7"), [("search", {"page": 7})]),
    Case("of a union the string", search(page="last"), [("search", {"page": "last"})]),
    Case(
        "what is not of its type stays a string",
        search(limit="many", exact="1", tags="a, b", options="[1]"),
        [("search", {"limit": "many", "exact": "1", "tags": "a, b", "options": "[1]"})],
    ),
    Case("an unknown parameter", search(other="1", more="a b"), [("search", {"other": 1, "more": "a b"})]),
    Case(
        "no schema: the JSON it is",
        search(a='[1, "x"]', b="-2.5", c="null", d="true", e="{}"),
        [("search", {"a": [1, "x"], "b": -2.5, "c": None, "d": True, "e": {}})],
        tools=None,
    ),
    Case(
        "no schema: or a string",
        search(a="[1, x", b="01", c="None", d='"q"', e=" 5 apples", f="", g="1e"),
        [
            (
                "search",
                {"a": "[1, x", "b": "01", "c": "None", "d": '"q"', "e": " 5 apples", "f": "", "g": "1e"},
            )
        ],
        tools=None,
    ),
    Case(
        "lines, one newline trimmed",
        search(query="\n  def f():\n    return '<b>'\n"),
        [("search", {"query": "\n  def f():\n    return '<b>'\n"})],
    ),
    Case(
        "inline values",
        "<function=search><parameter=query> a </parameter></function>",
        [("search", {"query": " a "})],
    ),
    Case(
        "empty values",
        "<function=search><parameter=query></parameter><parameter=zip>\n</parameter></function>",
        [("search", {"query": "", "zip": ""})],
    ),
    Case(
        "quotes, backslashes, controls",
        search(query='"a\\b"\t\x01é'),
        [("search", {"query": '"a\\b"\t\x01é'})],
    ),
    Case(
        "half tags in a value",
        search(query="</para <function </functio <"),
        [("search", {"query": "</para <function </functio <"})],
    ),
    Case(
        "a closing tag left out",
        "<function=search>\n<parameter=query>\na\n<parameter=limit>\n2\n</function>",
        [("search", {"query": "a", "limit": 2})],
    ),
    Case(
        "two closing tags left out",
        "<tool_call><function=search><parameter=query>a</tool_call>\nB",
        [("search", {"query": "a"})],
        "B",
    ),
    Case(
        "the function's closing tag left out",
        f"<tool_call><function=search><parameter=query>a</parameter></tool_call><tool_call>{PARIS}</tool_call>",
        [("search", {"query": "a"}), CALL],
    ),
    Case(
        "JSON in the outer tag",
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
        [("add", {"a": 1})],
    ),
    Case("unknown tool", "<function=zap><parameter=x>1</parameter></function>", [("zap", {"x": 1})]),
    Case(
        "cut in a string",
        "<tool_call>\n<function=search>\n<parameter=limit>\n2\n</parameter>\n<parameter=query>\na\n",
        [("search", {"limit": 2, "query": "a"})],
    ),
    Case("cut in a closing tag", "<function=search><parameter=query>a</parame", [("search", {"query": "a"})]),
    Case(
        "cut in a number",
        "<function=search><parameter=zip>1</parameter><parameter=limit>4",
        [("search", {"zip": "1"})],
    ),
    Case(
        "cut between parameters",
        "<function=search><parameter=limit>4</parameter>\n",
        [("search", {"limit": 4})],
    ),
    prose("cut before a value", "<tool_call>\n<function=search>\n<parameter=limit>\n2"),
    prose("cut in the name", "<tool_call>\n<function=sea"),
    Case(
        "junk between parameters",
        "<function=search><parameter=query>a</parameter> and </function>",
        [("search", {"query": "a"})],
        "and </function>",
    ),
    prose("junk before parameters", "<function=search> a <parameter=query>a</parameter></function>"),
    prose("junk for a name", "<function=> <function=a b> <function=<parameter=c>"),
    prose("not a call", '{"name":"Alice","age":31} <parameter=a>b</parameter>'),
    typed("a reference", {"$ref": "#/$defs/Size"}, "3", "3", **{"$defs": {"Size": {"type": "string"}}}),
    typed(
        "a reference with escapes",
        {"$ref": "#/$defs/a~1b"},
        "3",
        3,
        **{"$defs": {"a/b": {"type": "integer"}}},
    ),
    typed("a reference to nowhere", {"$ref": "#/$defs/X"}, "3", 3),
    typed("a reference elsewhere", {"$ref": "other.json"}, "3", 3),
    typed("a reference to itself", {"$ref": "#/properties/x"}, "3", 3),
    typed("enum of strings", {"enum": ["1", "2"]}, "1", "1"),
    typed("enum of several types", {"enum": ["a", 1, None, 2.5, True, [], {}]}, "1", 1),
    typed("const", {"const": "1"}, "1", "1"),
    typed("oneOf", {"oneOf": [{"type": "boolean"}, {"type": "string"}]}, "1", "1"),
    typed("anyOf with anything", {"anyOf": [{"type": "string"}, {}]}, "1", 1),
    typed("allOf", {"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]}, "1", "1"),
    typed("allOf of nothing", {"allOf": [{}]}, "1", 1),
    typed("nullable", {"type": "string", "nullable": True}, "null", None),
    typed("properties without a type", {"properties": {}}, "{'a': 1}", {"a": 1}),
    typed("items without a type", {"items": {}}, "['a']", ["a"]),
    typed("no type that JSON schema knows", {"type": "str"}, "1", 1),
    typed("a schema that is true", True, "1", 1),
    typed("a whole number", {"type": "integer"}, "3.0", 3.0),
    typed("no whole number", {"type": "integer"}, "3.5", "3.5"),
    typed("a number", {"type": "number"}, " -1e3 ", -1000.0),
    Case(
        "additional properties",
        "<function=f><parameter=y>1</parameter></function>",
        [("f", {"y": "1"})],
        tools=[ToolSpec(name="f", parameters={"additionalProperties": {"type": "string"}})],
    ),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("qwen3_coder", case)
