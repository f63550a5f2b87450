"""deepseek: V3 and R1 (type, name, fenced JSON) and V3.1 (name, JSON)."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
CALL = ("get_weather", {"city": "Paris"})
OLD = f'{CALL_BEGIN}function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```{CALL_END}'
NEW = f'{CALL_BEGIN}get_weather{SEP}{{"city": "Paris"}}{CALL_END}'

CASES = [
    Case("V3", f"{BEGIN}{OLD}{END}", [CALL], raw=['{"city": "Paris"}']),
    Case("V3, two", f"{BEGIN}{OLD}\n{OLD}{END}", [CALL, CALL]),
    Case("V3 after prose", f"I look.\n{BEGIN}{OLD}{END}", [CALL], "I look."),
    Case(
        "V3, bare fence",
        f'{BEGIN}{CALL_BEGIN}function{SEP}add\n```\n{{"a":1}}\n```{CALL_END}{END}',
        [("add", {"a": 1})],
    ),
    Case(
        "V3, no fence", f'{BEGIN}{CALL_BEGIN}function{SEP}add\n{{"a":1}}{CALL_END}{END}', [("add", {"a": 1})]
    ),
    Case(
        "V3, empty",
        f"{BEGIN}{CALL_BEGIN}function{SEP}get_time\n```json\n{{}}\n```{CALL_END}{END}",
        [("get_time", {})],
    ),
    Case(
        "V3, empty fence",
        f"{BEGIN}{CALL_BEGIN}function{SEP}get_time\n```json\n```{CALL_END}{END}",
        [("get_time", {})],
    ),
    Case(
        "V3, no arguments", f"{BEGIN}{CALL_BEGIN}function{SEP}get_time\n{CALL_END}{END}", [("get_time", {})]
    ),
    Case("V3.1", f"{BEGIN}{NEW}{END}", [CALL]),
    Case("V3.1, two", f"{BEGIN}{NEW}{NEW}{END}", [CALL, CALL]),
    Case("V3.1, prose around", f"A {BEGIN}{NEW}{END} B", [CALL], "A B"),
    Case("V3.1, no arguments", f"{BEGIN}{CALL_BEGIN}get_time{SEP}{CALL_END}{END}", [("get_time", {})]),
    Case(
        "V3.1, a tool called function",
        f'{BEGIN}{CALL_BEGIN}function{SEP}{{"a":1}}{CALL_END}{END}',
        [("function", {"a": 1})],
    ),
    Case("no outer tags", NEW, [CALL]),
    Case("no closing tags", f'{BEGIN}{CALL_BEGIN}get_weather{SEP}{{"city": "Paris"}}', [CALL]),
    Case(
        "the call's closing tag missing",
        f'{BEGIN}{CALL_BEGIN}add{SEP}{{"a":1}}{END} x',
        [("add", {"a": 1})],
        "x",
    ),
    Case(
        "fences and tags in a string",
        f'{BEGIN}{CALL_BEGIN}search{SEP}{{"query":"```{CALL_END}"}}{CALL_END}{END}',
        [("search", {"query": f"```{CALL_END}"})],
    ),
    Case("unknown tool", f'{BEGIN}{CALL_BEGIN}zap{SEP}{{"x":[]}}{CALL_END}{END}', [("zap", {"x": []})]),
    Case("cut in a string", f'{BEGIN}{CALL_BEGIN}search{SEP}{{"query":"ab', [("search", {"query": "ab"})]),
    Case("second cut", f"{BEGIN}{NEW}{CALL_BEGIN}get_w", [CALL], f"{CALL_BEGIN}get_w"),
    prose("cut before the arguments", f"{BEGIN}{CALL_BEGIN}function{SEP}add\n```js"),
    prose("cut in a marker", "Well <｜tool▁calls▁beg"),
    prose("malformed", f"{BEGIN} calls go here {END}"),
    prose("malformed arguments", f"{BEGIN}{CALL_BEGIN}add{SEP}{{a:1}}{CALL_END}{END}"),
    prose("no name", f"{BEGIN}{CALL_BEGIN}{SEP}{CALL_END}{END}"),
    Case(
        "malformed later",
        f'{CALL_BEGIN}add{SEP}{{"a":1,b}}{CALL_END}',
        [("add", {"a": 1})],
        f",b}}{CALL_END}",
    ),
    prose("not a call", '```json\n{"name":"Alice","age":31}\n```'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("deepseek", case)
