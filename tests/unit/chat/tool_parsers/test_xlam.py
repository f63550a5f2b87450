"""xlam: arrays of JSON calls, bare, fenced, after `[TOOL_CALLS]` or `</think>`."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})
ADD = '{"name": "add", "arguments": {"a": 1}}'
CALL_2 = ("add", {"a": 1})
ZAP = '[{"name": "zap", "arguments": {"x": 1}}]'

CASES = [
    Case("bare", f"[{PARIS}]", [CALL]),
    Case("bare, two", f"[{PARIS}, {ADD}]", [CALL, CALL_2]),
    Case("bare, lines", f"[\n  {PARIS},\n  {ADD}\n]\n", [CALL, CALL_2]),
    Case("bare, prose around", f"I look.\n[{PARIS}]\nDone.", [CALL], "I look.\nDone."),
    Case("one object", PARIS, [CALL]),
    Case("fenced", f"```json\n[{PARIS}]\n```", [CALL]),
    Case("fenced without a language", f"```\n[{PARIS}]\n```\nDone.", [CALL], "Done."),
    Case("fenced after prose", f"So:\n\n```json\n[{PARIS}]\n```", [CALL], "So:"),
    Case("after [TOOL_CALLS]", f"[TOOL_CALLS][{PARIS}]", [CALL], ids=["call_[A-Za-z0-9]{24}"]),
    Case("after [TOOL_CALLS], unknown tool", f"[TOOL_CALLS] {ZAP}", [("zap", {"x": 1})]),
    Case("in tags", f"<tool_call>[{PARIS}]</tool_call>.", [CALL], "."),
    Case("after thinking", f"<think>Hm.</think>[{PARIS}]", [CALL], "<think>Hm.</think>"),
    Case("after thinking, a space", f"Hm.</think>\n\n[{PARIS}]", [CALL], "Hm.</think>"),
    prose("after thinking, prose", "Hm.</think>[1] is {it}."),
    Case("no arguments", '[{"name": "get_time", "arguments": {}}]', [("get_time", {})]),
    prose("unknown tool", ZAP),
    Case("unknown tool, none known", ZAP, [("zap", {"x": 1})], tools=None),
    Case(
        "second unknown",
        f'[{PARIS}, {{"name": "zap", "arguments": {{}}}}]',
        [CALL],
        ', {"name": "zap", "arguments": {}}]',
    ),
    Case("cut in a string", '[{"name":"search","arguments":{"query":"ab', [("search", {"query": "ab"})]),
    prose("cut", '[{"name":"search","arg'),
    prose("cut fence", "```json\n["),
    prose("malformed", "[get_weather, Paris]"),
    prose("empty", "[] {} [{}] ```\n```"),
    prose("not a call", '[{"name":"Alice","age":31}]'),
    prose("not a call, none known", '[{"name":"Alice","age":31}]', tools=None),
    prose("a fenced table", '```json\n[{"name":"Alice"}, 1]\n```'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("xlam", case)
