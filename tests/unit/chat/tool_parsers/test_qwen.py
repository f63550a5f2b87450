"""qwen: JSON or function tags in `<tool_call>`, bare function tags, `[Calling tool: f({…})]`."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})
TAG = "<function=get_weather><parameter=city>Paris</parameter></function>"
CALLING = '[Calling tool: get_weather({"city": "Paris"})]'

CASES = [
    Case("JSON", f"<tool_call>\n{PARIS}\n</tool_call>", [CALL]),
    Case("JSON after prose", f"Sure.\n\n<tool_call>\n{PARIS}\n</tool_call>\n", [CALL], "Sure."),
    Case("two JSON calls", f"<tool_call>\n{PARIS}\n</tool_call>\n" * 2, [CALL, CALL]),
    Case("bare function tag", TAG, [CALL], raw=['{"city": "Paris"}']),
    Case("function tag in a tool_call tag", f"<tool_call>\n{TAG}\n</tool_call>", [CALL]),
    Case("two bare function tags", f"First {TAG} then\n{TAG}", [CALL, CALL], "First then"),
    Case("a tag without parameters", "<function=get_time></function>", [("get_time", {})]),
    Case("a tag with JSON", '<function=add>{"a": 1}</function>.', [("add", {"a": 1})], "."),
    Case(
        "types from the schema",
        "<function=search><parameter=zip>1</parameter><parameter=limit>1</parameter></function>",
        [("search", {"zip": "1", "limit": 1})],
    ),
    Case("calling tool", CALLING, [CALL], raw=['{"city": "Paris"}']),
    Case("calling tool in prose", f"I check. {CALLING} Wait.", [CALL], "I check. Wait."),
    Case("calling tools", f"{CALLING}\n{CALLING}", [CALL, CALL]),
    Case("calling a name like a tag", "[Calling tool: <x>({})]", [("<x>", {})]),
    prose("a tag that begins no body", "<tool_call> <tool_call><b> <function=<b>"),
    Case("calling without arguments", "[Calling tool: get_time()]", [("get_time", {})]),
    Case("calling with spaces", '[Calling tool:  add( {"a": 1} ) ]', [("add", {"a": 1})]),
    Case(
        "calling with brackets inside",
        '[Calling tool: search({"query": ")]"})]',
        [("search", {"query": ")]"})],
    ),
    Case("calling, cut", '[Calling tool: search({"query": "a b', [("search", {"query": "a b"})]),
    Case("calling, cut at its end", '[Calling tool: add({"a": 1})', [("add", {"a": 1})]),
    prose("calling, cut before the arguments", "[Calling tool: get_weather("),
    prose("calling, positional", '[Calling tool: get_weather("Paris")]'),
    prose("calling what", "[Calling tool: the weather tool]"),
    Case("calling, malformed later", '[Calling tool: add({"a": 1, b: 2})]', [("add", {"a": 1})], ", b: 2})]"),
    prose("not a call", 'Her name is {"name":"Alice","age":31} [1] <b>'),
    prose("half markers", "<function <tool_call [Calling tools"),
    Case("unknown tool", "<function=zap><parameter=x>1</parameter></function>", [("zap", {"x": 1})]),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("qwen", case)
