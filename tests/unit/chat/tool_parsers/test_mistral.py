"""mistral: `[TOOL_CALLS]` before an array, or before each `f{…}` or `f[ARGS]{…}`."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})
ADD = ("add", {"a": 1})
ID = "[A-Za-z0-9]{9}"

CASES = [
    Case("array", f"[TOOL_CALLS] [{PARIS}]", [CALL], ids=[ID]),
    Case("array without a space", f"[TOOL_CALLS][{PARIS}]", [CALL]),
    Case(
        "array of two",
        f'[TOOL_CALLS] [{PARIS}, {{"name": "add", "arguments": {{"a": 1}}}}]',
        [CALL, ADD],
        ids=[ID] * 2,
    ),
    Case("array with ids", '[TOOL_CALLS] [{"name":"add","arguments":{"a":1},"id":"abcdefghi"}]', [ADD]),
    Case("one object", f"[TOOL_CALLS]{PARIS}", [CALL]),
    Case("name and object", '[TOOL_CALLS]add{"a": 1}', [ADD], raw=['{"a": 1}'], ids=[ID]),
    Case(
        "two of those", '[TOOL_CALLS]add{"a":1}[TOOL_CALLS]get_time{}', [ADD, ("get_time", {})], ids=[ID] * 2
    ),
    Case("name, [ARGS], object", '[TOOL_CALLS]add[ARGS]{"a":1}', [ADD]),
    Case("two of those with [ARGS]", '[TOOL_CALLS]add[ARGS]{"a":1}[TOOL_CALLS]add[ARGS]{"a":1}', [ADD, ADD]),
    Case("with [CALL_ID]", '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a":1}', [ADD]),
    Case("after prose", f"Let me see. [TOOL_CALLS] [{PARIS}]", [CALL], "Let me see."),
    Case("before prose", '[TOOL_CALLS]add{"a":1} Done.', [ADD], "Done."),
    Case("between prose", 'A\n[TOOL_CALLS]add{"a":1}\n\nB', [ADD], "A\nB"),
    Case("after an array, prose", f"[TOOL_CALLS] [{PARIS}]\nDone.", [CALL], "Done."),
    Case(
        "brackets in strings",
        '[TOOL_CALLS]search{"query":"[TOOL_CALLS]]}"}',
        [("search", {"query": "[TOOL_CALLS]]}"})],
    ),
    Case("line breaks", '[TOOL_CALLS]\nadd\n{"a":1}\n', [ADD]),
    Case("unknown tool", '[TOOL_CALLS]zap{"x":null}', [("zap", {"x": None})]),
    Case("cut in a string", '[TOOL_CALLS]search{"query":"ab', [("search", {"query": "ab"})]),
    Case("cut array", f"[TOOL_CALLS] [{PARIS}", [CALL]),
    Case("cut array after its comma", f"[TOOL_CALLS] [{PARIS}, ", [CALL]),
    Case("array with a comma too many", f"[TOOL_CALLS] [{PARIS}, ]", [CALL]),
    prose("cut in the name", "[TOOL_CALLS]get_wea"),
    prose("cut before the arguments", "[TOOL_CALLS]get_weather[ARGS]"),
    prose("cut in the call's id", "[TOOL_CALLS]get_weather[CALL_ID]abc"),
    prose("cut marker", "What [TOOL_CAL"),
    prose("malformed", "[TOOL_CALLS]add(1, 2)"),
    prose("malformed array", '[TOOL_CALLS] [1, {"name": "add"}]'),
    prose("[CALL_ID] without [ARGS]", '[TOOL_CALLS]add[CALL_ID]abc{"a":1}'),
    prose("no call at all", "[TOOL_CALLS]"),
    Case("malformed later", '[TOOL_CALLS]add{"a":1,b:2} x', [ADD], ",b:2} x"),
    prose("not a call", '[{"name":"Alice","age":31}] [TOOL] [[TOOL_CALL]]'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("mistral", case)
