"""granite: `<|tool_call|>[…]`, `<tool_call>[…]` and `<tool_call>{…}</tool_call>`."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})
ADD = '{"name": "add", "arguments": {"a": 1}}'
CALL_2 = ("add", {"a": 1})

CASES = [
    Case("3.0", f"<|tool_call|>[{PARIS}]", [CALL]),
    Case("3.0, two", f"<|tool_call|>[{PARIS}, {ADD}]", [CALL, CALL_2]),
    Case("3.0, a space", f"<|tool_call|> [{PARIS}]", [CALL]),
    Case("3.0, one object", f"<|tool_call|>{PARIS}", [CALL]),
    Case("3.0, closed", f"<|tool_call|>[{PARIS}]<|/tool_call|> B", [CALL], "B"),
    Case("3.0, prose around", f"I look.\n<|tool_call|>[{PARIS}]\nDone.", [CALL], "I look.\nDone."),
    Case("3.1", f"<tool_call>[{PARIS}, {ADD}]", [CALL, CALL_2]),
    Case("3.1, closed", f"<tool_call>[{PARIS}]</tool_call>", [CALL]),
    Case("4", f"<tool_call>\n{PARIS}\n</tool_call>", [CALL]),
    Case("4, two", f"<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>", [CALL, CALL_2]),
    Case("4, prose around", f"A\n\n<tool_call>{PARIS}</tool_call>\n\nB", [CALL], "A\n\nB"),
    Case("4, not closed", f"<tool_call>{PARIS}", [CALL]),
    Case("no arguments", '<|tool_call|>[{"name": "get_time", "arguments": {}}]', [("get_time", {})]),
    Case(
        "brackets in strings",
        '<|tool_call|>[{"name":"search","arguments":{"query":"]}<|tool_call|>"}}]',
        [("search", {"query": "]}<|tool_call|>"})],
    ),
    Case("unknown tool", '<|tool_call|>[{"name":"zap","arguments":{"x":1}}]', [("zap", {"x": 1})]),
    Case(
        "cut in a string",
        '<|tool_call|>[{"name":"search","arguments":{"query":"ab',
        [("search", {"query": "ab"})],
    ),
    Case("second cut", f'<|tool_call|>[{PARIS}, {{"name": "ad', [CALL], ', {"name": "ad'),
    Case("second malformed", f"<|tool_call|>[{PARIS}, 5]", [CALL], ", 5]"),
    prose("cut", '<|tool_call|>[{"name":"search"'),
    prose("cut marker", "A <|tool_ca"),
    prose("an empty array", "<|tool_call|>[]"),
    prose("malformed", "<|tool_call|>get_weather(Paris)"),
    prose("not a call", '[{"name":"Alice","age":31}]'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("granite", case)
