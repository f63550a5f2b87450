"""hermes: JSON calls in `<tool_call>` tags; what every format with JSON arguments owes to the same code."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
LYON = '{"name": "get_weather", "arguments": {"city": "Lyon", "days": 2}}'
CALL = ("get_weather", {"city": "Paris"})
CALL_2 = ("get_weather", {"city": "Lyon", "days": 2})

CASES = [
    Case("one", f"<tool_call>\n{PARIS}\n</tool_call>", [CALL], raw=['{"city": "Paris"}']),
    Case("no line breaks", f"<tool_call>{PARIS}</tool_call>", [CALL]),
    Case("after prose", f"Let me look.\n<tool_call>\n{PARIS}\n</tool_call>", [CALL], "Let me look."),
    Case("before prose", f"<tool_call>{PARIS}</tool_call>\n\nDone.", [CALL], "Done."),
    Case(
        "between prose",
        f"One.\n\n<tool_call>{PARIS}</tool_call>\nTwo. <tool_call>{LYON}</tool_call> ",
        [CALL, CALL_2],
        "One.\n\nTwo.",
    ),
    Case(
        "two tags", f"<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n{LYON}\n</tool_call>", [CALL, CALL_2]
    ),
    Case("two in one tag", f"<tool_call>\n{PARIS}\n{LYON}\n</tool_call>", [CALL, CALL_2]),
    Case("two with a comma", f"<tool_call>{PARIS}, {LYON}</tool_call>", [CALL, CALL_2]),
    Case("an array", f"<tool_call>[{PARIS}, {LYON}]</tool_call>", [CALL, CALL_2]),
    Case("no closing tag", f"<tool_call>{PARIS}", [CALL]),
    Case("no closing tag, then another", f"<tool_call>{PARIS}\n<tool_call>{LYON}", [CALL, CALL_2]),
    Case("closing tag cut", f"<tool_call>{PARIS}\n</tool_", [CALL]),
    Case("no arguments key", '<tool_call>{"name": "get_time"}</tool_call>', [("get_time", {})], raw=["{}"]),
    Case(
        "empty arguments", '<tool_call>{"name": "get_time", "arguments": { }}</tool_call>', [("get_time", {})]
    ),
    Case(
        "null arguments", '<tool_call>{"name": "get_time", "arguments": null}</tool_call>', [("get_time", {})]
    ),
    Case(
        "arguments first",
        'I will.<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>',
        [CALL],
        "I will.",
    ),
    Case("parameters", '<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>', [("add", {"a": 1})]),
    Case(
        "arguments as a string",
        r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"Pa\\\"ris\"}"}</tool_call>',
        [("get_weather", {"city": 'Pa"ris'})],
    ),
    Case("empty string", '<tool_call>{"name": "get_time", "arguments": ""}</tool_call>', [("get_time", {})]),
    Case(
        "OpenAI's shape",
        f'<tool_call>{{"id": "x", "type": "function", "function": {PARIS}}}</tool_call>',
        [CALL],
    ),
    Case(
        "a name under function", '<tool_call>{"function": "add", "arguments": {}}</tool_call>', [("add", {})]
    ),
    Case(
        "keys to be read over",
        '<tool_call>{"id": [1, {"a": "}"}], "name": "add", "arguments": {"a": 1}, "why": "b"}</tool_call>',
        [("add", {"a": 1})],
    ),
    Case(
        "nested",
        '<tool_call>{"name":"search","arguments":{"options":{"a":[[],{},[{"b":[1,-2.5e3,true]}]],"c":null}}}'
        "</tool_call>",
        [("search", {"options": {"a": [[], {}, [{"b": [1, -2.5e3, True]}]], "c": None}})],
    ),
    Case(
        "braces, tags and escapes in strings",
        r'<tool_call>{"name":"search","arguments":{"query":"}</tool_call>{\\\"\u00e9\n"}}</tool_call>',
        [("search", {"query": '}</tool_call>{\\"é\n'})],
        raw=[r'{"query":"}</tool_call>{\\\"\u00e9\n"}'],
    ),
    Case(
        "raw control characters",
        '<tool_call>{"name":"search","arguments":{"query":"a\n\tb\x01"}}</tool_call>',
        [("search", {"query": "a\n\tb\x01"})],
    ),
    Case(
        "stray backslashes",
        r'<tool_call>{"name":"search","arguments":{"query":"\d+ it\'s \u12"}}</tool_call>',
        [("search", {"query": r"\d+ it's \u12"})],
    ),
    Case(
        "a comma too many",
        '<tool_call>{"name":"search","arguments":{"tags":["a", ],"limit":1 , },}</tool_call>',
        [("search", {"tags": ["a"], "limit": 1})],
    ),
    Case("unknown tool", '<tool_call>{"name":"zap","arguments":{"x":1}}</tool_call>', [("zap", {"x": 1})]),
    Case("no tools known", f"<tool_call>{PARIS}</tool_call>", [CALL], tools=None),
    Case(
        "ids",
        f"<tool_call>{PARIS}</tool_call><tool_call>{LYON}</tool_call>",
        [CALL, CALL_2],
        ids=["call_[A-Za-z0-9]{24}"] * 2,
    ),
    Case(
        "cut in a string",
        '<tool_call>{"name": "get_weather", "arguments": {"days": 2, "city": "Par',
        [("get_weather", {"days": 2, "city": "Par"})],
    ),
    Case(
        "cut in an escape",
        r'<tool_call>{"name": "search", "arguments": {"query": "a\u00',
        [("search", {"query": "a"})],
    ),
    Case(
        "cut in a number",
        '<tool_call>{"name": "search", "arguments": {"tags": ["a"], "options": {"b": [1, 2',
        [("search", {"tags": ["a"], "options": {"b": [1]}})],
    ),
    Case(
        "cut after a key",
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b":',
        [("add", {"a": 1})],
    ),
    Case("cut after the arguments", '<tool_call>{"name": "add", "arguments": {"a": 1}', [("add", {"a": 1})]),
    prose("cut before a value", '<tool_call>{"name": "add", "arguments": {"a": '),
    prose("cut before the arguments", '<tool_call>{"name": "add", "argu'),
    prose("cut with the name yet to come", '<tool_call>{"arguments": {"a": 1}, "na'),
    prose("cut marker", "Hello <tool_"),
    Case(
        "second call cut",
        f'<tool_call>{PARIS}</tool_call><tool_call>{{"name": "add", "arg',
        [CALL],
        '<tool_call>{"name": "add", "arg',
    ),
    Case("second in an array cut", f'<tool_call>[{PARIS}, {{"na', [CALL], ', {"na'),
    Case(
        "malformed in the arguments",
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": oops}}</tool_call> Hm.',
        [("add", {"a": 1})],
        ', "b": oops}}</tool_call> Hm.',
    ),
    prose("malformed at once", '<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call>'),
    prose("no object as arguments", '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>'),
    prose("no JSON in the string", '<tool_call>{"name": "add", "arguments": "a: 1"}</tool_call>'),
    prose("no name", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    prose("blank name", '<tool_call>{"name": " ", "arguments": {"a": 1}}</tool_call>'),
    prose("a name that cannot be sent", r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'),
    prose("a name that is no string", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
    prose("an object that is no call", '<tool_call>{"name":"Alice","age":31}</tool_call>'),
    Case(
        "of two objects one is no call",
        f'<tool_call>{PARIS}\n{{"name":"Alice","age":31}}</tool_call>',
        [CALL],
        '{"name":"Alice","age":31}</tool_call>',
    ),
    prose("an empty array", "<tool_call>[]</tool_call>"),
    prose("no JSON", "<tool_call>get_weather Paris</tool_call>"),
    prose("empty tags", "The tags are <tool_call></tool_call>."),
    Case(
        "tags in prose, then a call",
        f"<tool_call> is how: <tool_call>{PARIS}</tool_call>",
        [CALL],
        "<tool_call> is how:",
    ),
    prose("not a call", '{"name":"Alice","age":31}'),
    prose("a call without tags", PARIS),
    prose("half markers", "a < b, <tool, <tool_callx>, <<tool_call"),
    prose("whitespace", " \n\n  text \n\n "),
    prose("nothing but whitespace", " \n "),
    Case("junk after a call", f"<tool_call>{PARIS} and so on</tool_call>", [CALL], "and so on</tool_call>"),
    Case("a brace too many", f"<tool_call>{PARIS}}}\n</tool_call>", [CALL], "}\n</tool_call>"),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("hermes", case)
