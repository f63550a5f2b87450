"""kimi: calls in a section, each with the id it is to keep."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL = ("get_weather", {"city": "Paris"})


def call(call_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


PARIS = call("functions.get_weather:0", '{"city": "Paris"}')
ADD = call("functions.add:1", '{"a": 1}')

CASES = [
    Case("one", f"{BEGIN}{PARIS}{END}", [CALL], ids=["functions.get_weather:0"], raw=['{"city": "Paris"}']),
    Case(
        "two",
        f"{BEGIN}{PARIS}{ADD}{END}",
        [CALL, ("add", {"a": 1})],
        ids=["functions.get_weather:0", "functions.add:1"],
    ),
    Case("prose around", f"I look.{BEGIN}{PARIS}{END}Done.", [CALL], "I look.Done."),
    Case("whitespace between", f"A\n{BEGIN}\n{PARIS}\n{ADD}\n{END}\n", [CALL, ("add", {"a": 1})], "A"),
    Case(
        "the index goes on from before",
        BEGIN + call("functions.add:7", "{}") + END,
        [("add", {})],
        ids=["functions.add:7"],
    ),
    Case(
        "whitespace around the id",
        BEGIN + call(" functions.add:3\n", " {} "),
        [("add", {})],
        ids=["functions.add:3"],
    ),
    Case(
        "no index",
        BEGIN + call("functions.add", "{}") + call("add", "{}") + END,
        [("add", {}), ("add", {})],
        ids=["functions.add:0", "functions.add:1"],
    ),
    Case(
        "an index twice",
        BEGIN + call("functions.add:4", "{}") * 2 + call("functions.add:0", "{}") + END,
        [("add", {})] * 3,
        ids=["functions.add:4", "functions.add:5", "functions.add:0"],
    ),
    Case("no prefix", BEGIN + call("add:2", "{}") + END, [("add", {})], ids=["functions.add:2"]),
    Case(
        "dots and colons in the name",
        BEGIN + call("functions.mcp.a:b-c:12", "{}") + END,
        [("mcp.a:b-c", {})],
        ids=["functions.mcp.a:b-c:12"],
    ),
    Case(
        "digits without end", BEGIN + call("functions.f:" + "9" * 5000, "{}") + END, [("f:" + "9" * 5000, {})]
    ),
    Case("no section", PARIS, [CALL]),
    Case("no arguments", BEGIN + call("functions.get_time:0", "") + END, [("get_time", {})]),
    Case("no closing tags", f"{BEGIN}{PARIS[: -len('<|tool_call_end|>')]}", [CALL]),
    Case(
        "a tag in a string",
        BEGIN + call("functions.search:0", '{"query":"<|tool_call_end|>"}') + END,
        [("search", {"query": "<|tool_call_end|>"})],
    ),
    Case("unknown tool", BEGIN + call("functions.zap:0", '{"x":1}') + END, [("zap", {"x": 1})]),
    Case(
        "cut in a string",
        f'{BEGIN}<|tool_call_begin|>functions.search:0<|tool_call_argument_begin|>{{"query":"ab',
        [("search", {"query": "ab"})],
    ),
    Case(
        "second cut", f"{BEGIN}{PARIS}<|tool_call_begin|>functions.", [CALL], "<|tool_call_begin|>functions."
    ),
    prose("cut in the id", f"{BEGIN}<|tool_call_begin|>functions.get"),
    prose("cut in a marker", "A <|tool_calls_sec"),
    prose("an empty section", f"{BEGIN}{END}"),
    prose("no id", BEGIN + call("", "{}")),
    prose("malformed arguments", BEGIN + call("functions.add:0", "{a:1}") + END),
    Case(
        "malformed later", call("functions.add:0", '{"a":1,b}'), [("add", {"a": 1})], ",b}<|tool_call_end|>"
    ),
    prose("not a call", '{"name":"Alice","age":31} <|tool_call'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("kimi", case)
