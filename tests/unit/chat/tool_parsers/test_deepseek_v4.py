"""deepseek_v4: DSML, whose parameters say whether they are strings."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

BEGIN, END = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
OLD_BEGIN, OLD_END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
CALL = ("get_weather", {"city": "Paris"})


def parameter(name: str, value: str, string: bool) -> str:
    attribute = str(string).lower()
    return f'<｜DSML｜parameter name="{name}" string="{attribute}">{value}</｜DSML｜parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n{"".join(parameters)}</｜DSML｜invoke>\n'


PARIS = invoke("get_weather", parameter("city", "Paris", True))

CASES = [
    Case("V4", f"{BEGIN}\n{PARIS}{END}", [CALL], raw=['{"city": "Paris"}']),
    Case("V3.2", f"{OLD_BEGIN}\n{PARIS}{OLD_END}", [CALL]),
    Case("two", f"{BEGIN}\n{PARIS}{PARIS}{END}", [CALL, CALL]),
    Case("prose around", f"I look.\n\n{BEGIN}\n{PARIS}{END}\n\nDone.", [CALL], "I look.\n\nDone."),
    Case("no parameters", BEGIN + invoke("get_time") + END, [("get_time", {})]),
    Case(
        "not strings",
        BEGIN + invoke("zap", parameter("a", "1", False), parameter("b", "[true, null]", False)) + END,
        [("zap", {"a": 1, "b": [True, None]})],
    ),
    Case(
        "strings",
        BEGIN + invoke("zap", parameter("a", "1", True), parameter("b", "{}", True)) + END,
        [("zap", {"a": "1", "b": "{}"})],
    ),
    Case(
        "a string whatever the schema says",
        BEGIN + invoke("search", parameter("limit", "1", True)) + END,
        [("search", {"limit": "1"})],
    ),
    Case(
        "no string, but the schema says so",
        BEGIN + invoke("search", parameter("zip", "1", False)) + END,
        [("search", {"zip": "1"})],
    ),
    Case(
        "nothing said",
        f'{BEGIN}<｜DSML｜invoke name="search"><｜DSML｜parameter name="limit">1</｜DSML｜parameter>'
        f"</｜DSML｜invoke>{END}",
        [("search", {"limit": 1})],
    ),
    Case(
        "values are kept as they are",
        BEGIN + invoke("search", parameter("query", "\n a\n", True)) + END,
        [("search", {"query": "\n a\n"})],
    ),
    Case(
        "tags in a value",
        BEGIN + invoke("search", parameter("query", "</parameter></｜DSML｜", True)) + END,
        [("search", {"query": "</parameter></｜DSML｜"})],
    ),
    Case("no block", PARIS, [CALL]),
    Case(
        "no closing tags",
        f'{BEGIN}<｜DSML｜invoke name="get_weather">{parameter("city", "Paris", True)}',
        [CALL],
    ),
    Case("unknown tool", BEGIN + invoke("zap", parameter("x", "1", False)) + END, [("zap", {"x": 1})]),
    Case(
        "cut in a string",
        f'{BEGIN}<｜DSML｜invoke name="zap"><｜DSML｜parameter name="q" string="true">a b</｜DS',
        [("zap", {"q": "a b"})],
    ),
    Case(
        "cut in a value",
        f'{BEGIN}<｜DSML｜invoke name="zap">{parameter("p", "1", False)}'
        '<｜DSML｜parameter name="q" string="false">[1',
        [("zap", {"p": 1})],
    ),
    prose(
        "cut in the only value",
        f'{BEGIN}<｜DSML｜invoke name="zap"><｜DSML｜parameter name="q" string="false">[1',
    ),
    prose("cut in the name", f'{BEGIN}\n<｜DSML｜invoke name="get'),
    prose("cut marker", "A <｜DSML｜tool"),
    prose("an empty block", f"{BEGIN}\n{END}"),
    prose("prose in the block", f"{BEGIN}get_weather(Paris){END}"),
    Case("junk between calls", f"{BEGIN}{PARIS} and {PARIS}{END}", [CALL, CALL], "and"),
    prose("not a call", '{"name":"Alice","age":31} ｜DSML｜'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("deepseek_v4", case)
