"""nemotron: function tags or JSON in `<tool_call>`, arrays in `<TOOLCALL>`."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})
ADD = '{"name": "add", "arguments": {"a": 1}}'
CALL_2 = ("add", {"a": 1})
TAG = "<function=get_weather><parameter=city>Paris</parameter></function>"

CASES = [
    Case("function tag", f"<tool_call>{TAG}</tool_call>", [CALL], raw=['{"city": "Paris"}']),
    Case(
        "function tag, lines",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "</function>\n</tool_call>",
        [CALL],
    ),
    Case("two tags", f"<tool_call>{TAG}</tool_call>\n<tool_call>{TAG}</tool_call>", [CALL, CALL]),
    Case("prose around", f"A <tool_call>{TAG}</tool_call> B", [CALL], "A B"),
    Case(
        "types",
        "<tool_call><function=search><parameter=zip>1</parameter><parameter=limit>1</parameter></function>"
        "</tool_call>",
        [("search", {"zip": "1", "limit": 1})],
    ),
    Case("no parameters", "<tool_call><function=get_time></function></tool_call>", [("get_time", {})]),
    Case("no outer tag", TAG, [CALL]),
    Case("JSON", f"<tool_call>{PARIS}</tool_call>", [CALL]),
    Case("JSON, two", f"<tool_call>{PARIS}</tool_call><tool_call>{ADD}</tool_call>", [CALL, CALL_2]),
    Case("array", f"<TOOLCALL>[{PARIS}]</TOOLCALL>", [CALL]),
    Case("array of two", f"<TOOLCALL>[{PARIS}, {ADD}]</TOOLCALL>\n", [CALL, CALL_2]),
    Case(
        "array, prose around", f"I look.\n\n<TOOLCALL>[{PARIS}]</TOOLCALL>Done.", [CALL], "I look.\n\nDone."
    ),
    Case("array, not closed", f"<TOOLCALL>[{PARIS}]", [CALL]),
    Case("one object", f"<TOOLCALL>{PARIS}</TOOLCALL>", [CALL]),
    Case("unknown tool", '<TOOLCALL>[{"name":"zap","arguments":{"x":1}}]</TOOLCALL>', [("zap", {"x": 1})]),
    Case(
        "cut in a string",
        '<TOOLCALL>[{"name":"search","arguments":{"query":"ab',
        [("search", {"query": "ab"})],
    ),
    Case(
        "cut in a parameter",
        "<tool_call><function=search><parameter=query>ab\n",
        [("search", {"query": "ab"})],
    ),
    prose("cut", '<TOOLCALL>[{"name":"search"'),
    prose("cut marker", "A <TOOLCA"),
    prose("an empty array", "<TOOLCALL>[]</TOOLCALL>"),
    prose("malformed", "<TOOLCALL>get_weather(Paris)</TOOLCALL>"),
    prose("not a call", '[{"name":"Alice","age":31}] <TOOLS>'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("nemotron", case)
