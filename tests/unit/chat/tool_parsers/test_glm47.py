"""glm47: a name, then keys and values in tags of their own."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

CALL = ("get_weather", {"city": "Paris"})


def call(name: str, *, lines: bool = True, **values: str) -> str:
    end = "\n" if lines else ""
    pairs = "".join(
        f"<arg_key>{key}</arg_key>{end}<arg_value>{value}</arg_value>{end}" for key, value in values.items()
    )
    return f"<tool_call>{name}{end}{pairs}</tool_call>"


PARIS = call("get_weather", city="Paris")

CASES = [
    Case("one", PARIS, [CALL], raw=['{"city": "Paris"}']),
    Case("no line breaks", call("get_weather", lines=False, city="Paris"), [CALL]),
    Case("two", f"{PARIS}\n{PARIS}", [CALL, CALL]),
    Case("two without line breaks", call("get_weather", lines=False, city="Paris") * 2, [CALL, CALL]),
    Case("prose around", f"I look.\n{PARIS}\nDone.", [CALL], "I look.\nDone."),
    Case("no arguments", call("get_time"), [("get_time", {})]),
    Case("no arguments, no line breaks", call("get_time", lines=False), [("get_time", {})]),
    Case(
        "types",
        call("search", query="1", limit="1", exact="true", tags='["a"]', options='{"a": 1}'),
        [("search", {"query": "1", "limit": 1, "exact": True, "tags": ["a"], "options": {"a": 1}})],
    ),
    Case(
        "no schema",
        call("zap", x="1", y="a b", z='["c"]'),
        [("zap", {"x": 1, "y": "a b", "z": ["c"]})],
        tools=None,
    ),
    Case("values are kept as they are", call("search", query="\n a\n"), [("search", {"query": "\n a\n"})]),
    Case(
        "tags in a value",
        call("search", query="<b></arg_key></tool_cal"),
        [("search", {"query": "<b></arg_key></tool_cal"})],
    ),
    Case("quotes and backslashes", call("search", query='"\\n"'), [("search", {"query": '"\\n"'})]),
    Case(
        "spaces around a key",
        "<tool_call>add <arg_key> a </arg_key> <arg_value>1</arg_value> </tool_call>",
        [("add", {"a": 1})],
    ),
    Case(
        "a value's closing tag left out",
        "<tool_call>search<arg_key>query</arg_key><arg_value>a"
        "<arg_key>limit</arg_key><arg_value>2</tool_call>B",
        [("search", {"query": "a", "limit": 2})],
        "B",
    ),
    Case("name and object", '<tool_call>add\n{"a": 1}\n</tool_call>', [("add", {"a": 1})]),
    Case("JSON", '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', [("add", {"a": 1})]),
    Case(
        "function tag",
        "<tool_call><function=add><parameter=a>1</parameter></function></tool_call>",
        [("add", {"a": 1})],
    ),
    Case("unknown tool", call("zap", x="1"), [("zap", {"x": 1})]),
    Case("cut in a string", PARIS[: PARIS.index("ris")], [("get_weather", {"city": "Pa"})]),
    Case("cut in a closing tag", PARIS[: PARIS.index("_value>\n</tool")], [CALL]),
    Case(
        "cut after an argument",
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value>",
        [("add", {"a": 1})],
    ),
    Case(
        "cut in a number",
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key><arg_value>2",
        [("add", {"a": 1})],
    ),
    prose("cut in the only number", "<tool_call>add<arg_key>a</arg_key><arg_value>1"),
    prose("cut in a key", "<tool_call>add\n<arg_key>a"),
    prose("cut in the name", "<tool_call>get_w"),
    prose("cut marker", "A <tool_c"),
    prose("prose in the tag", "<tool_call>the weather</tool_call>"),
    prose("nothing in the tag", "<tool_call></tool_call>"),
    prose("a key without a value", "<tool_call>add<arg_key>a</arg_key></tool_call>"),
    Case(
        "junk between arguments",
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value>, and",
        [("add", {"a": 1})],
        ", and",
    ),
    prose("not a call", '{"name":"Alice","age":31} <arg_key>a</arg_key>'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("glm47", case)
