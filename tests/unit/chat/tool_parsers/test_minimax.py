"""minimax: `<invoke>` and `<parameter>` tags in `<minimax:tool_call>`."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"
CALL = ("get_weather", {"city": "Paris"})


def invoke(name: str, **values: str) -> str:
    parameters = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in values.items())
    return f'<invoke name="{name}">\n{parameters}</invoke>\n'


PARIS = invoke("get_weather", city="Paris")

CASES = [
    Case(
        "arguments in JSON",
        BEGIN + '<invoke name="get_weather">\n{"city": "</invoke>", "days": 2}\n</invoke>' + PARIS + END,
        [("get_weather", {"city": "</invoke>", "days": 2}), CALL],
    ),
    Case("one", f"{BEGIN}\n{PARIS}{END}", [CALL], raw=['{"city": "Paris"}']),
    Case(
        "no line breaks",
        f'{BEGIN}<invoke name="get_weather"><parameter name="city">Paris</parameter></invoke>{END}',
        [CALL],
    ),
    Case("two in a block", f"{BEGIN}\n{PARIS}{invoke('add', a='1')}{END}", [CALL, ("add", {"a": 1})]),
    Case("two blocks", f"{BEGIN}\n{PARIS}{END}\n{BEGIN}\n{PARIS}{END}", [CALL, CALL]),
    Case("prose around", f"I look.\n{BEGIN}\n{PARIS}{END}\nDone.", [CALL], "I look.\nDone."),
    Case("no parameters", f"{BEGIN}\n{invoke('get_time')}{END}", [("get_time", {})]),
    Case(
        "types",
        BEGIN + invoke("search", query="1", limit="1", exact="true", tags='["a"]') + END,
        [("search", {"query": "1", "limit": 1, "exact": True, "tags": ["a"]})],
    ),
    Case(
        "values on lines of their own",
        BEGIN + invoke("search", query="\n a\n b\n") + END,
        [("search", {"query": " a\n b"})],
    ),
    Case(
        "tags in a value",
        BEGIN + invoke("search", query="<b></p> <parameter") + END,
        [("search", {"query": "<b></p> <parameter"})],
    ),
    Case(
        "other quotes",
        f"{BEGIN}<invoke name='add'><parameter name=a>1</parameter></invoke>{END}",
        [("add", {"a": 1})],
    ),
    Case(
        "more attributes",
        f'{BEGIN}<invoke id="1" name = "add" ><parameter type="n" name="a">1</parameter></invoke>{END}',
        [("add", {"a": 1})],
    ),
    Case(
        "no closing tags",
        f'{BEGIN}\n<invoke name="add">\n<parameter name="a">1</parameter>\n',
        [("add", {"a": 1})],
    ),
    Case(
        "a parameter's closing tag left out",
        f'{BEGIN}<invoke name="search"><parameter name="query">a</invoke>{END}B',
        [("search", {"query": "a"})],
        "B",
    ),
    Case(
        "closing tags left out",
        f'{BEGIN}<invoke name="search"><parameter name="query">a{END}B',
        [("search", {"query": "a"})],
        "B",
    ),
    Case("unknown tool", BEGIN + invoke("zap", x="1") + END, [("zap", {"x": 1})]),
    Case(
        "cut in a string",
        f'{BEGIN}<invoke name="search"><parameter name="query">a b</para',
        [("search", {"query": "a b"})],
    ),
    Case(
        "cut in a number",
        f'{BEGIN}<invoke name="search"><parameter name="zip">1</parameter><parameter name="limit">1',
        [("search", {"zip": "1"})],
    ),
    Case("second cut", f'{BEGIN}{PARIS}<invoke name="ad', [CALL], '<invoke name="ad'),
    prose("cut in the name", f'{BEGIN}\n<invoke name="get'),
    prose("cut marker", "A <minimax:to"),
    prose("an empty block", f"{BEGIN}\n{END}"),
    prose("no name", f"{BEGIN}<invoke><parameter name='a'>1</parameter></invoke>{END}"),
    prose("no parameter's name", f"{BEGIN}<invoke name='f'><parameter>1</parameter></invoke>{END}"),
    prose("prose in the block", f"{BEGIN}get_weather(Paris){END}"),
    Case(
        "junk between parameters",
        f'{BEGIN}<invoke name="add"><parameter name="a">1</parameter> x',
        [("add", {"a": 1})],
        "x",
    ),
    prose("not a call", '{"name":"Alice","age":31} <invoke name="add"></invoke>'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("minimax", case)
