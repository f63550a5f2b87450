"""llama: JSON after `<|python_tag|>` or bare, function tags, calls in Python; what bare formats owe."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

PARIS = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})
ADD = ("add", {"a": 1})

CASES = [
    Case(
        "Python, what looks like its own words and quotes",
        """[search(query="None, 'True' = False", tags=['a b', "it's", ''], limit=None, exact=True)]""",
        [
            (
                "search",
                {"query": "None, 'True' = False", "tags": ["a b", "it's", ""], "limit": None, "exact": True},
            )
        ],
    ),
    Case(
        "Python, simple arguments among others",
        """[search(zip='1', query='''a" b''', options={'a': [1, (2,)], "b": {}} ,tags=[ 'x' , ],)]""",
        [("search", {"zip": "1", "query": 'a" b', "options": {"a": [1, [2]], "b": {}}, "tags": ["x"]})],
    ),
    Case(
        "LFM2",
        '<|tool_call_start|>[get_weather(city="Paris"), add(a=1)]<|tool_call_end|>Wait.',
        [("get_weather", {"city": "Paris"}), ("add", {"a": 1})],
        "Wait.",
    ),
    Case("tagged", f"<|python_tag|>{PARIS}", [CALL]),
    Case("tagged, two", f'<|python_tag|>{PARIS}; {{"name": "add", "parameters": {{"a": 1}}}}', [CALL, ADD]),
    Case("tagged, prose around", f"Let me see.<|python_tag|>{PARIS} Done.", [CALL], "Let me see. Done."),
    Case("tagged, unknown tool", '<|python_tag|>{"name": "zap", "parameters": {}}', [("zap", {})]),
    Case("tagged array", f"<|python_tag|>[{PARIS}]", [CALL]),
    Case(
        "built-in tool", '<|python_tag|>brave_search.call(query="a b")', [("brave_search", {"query": "a b"})]
    ),
    prose("code", '<|python_tag|>print("Hello")\nx = {"a": [1]}'),
    prose("code with keywords", "<|python_tag|>add(a=1)"),
    prose("tagged, cut", '<|python_tag|>{"name": "get_weather", "para'),
    Case("bare", PARIS, [CALL]),
    Case("bare, arguments", '{"name": "add", "arguments": {"a": 1}}', [ADD]),
    Case("bare, typed", '{"type": "function", "name": "add", "parameters": {"a": 1}}', [ADD]),
    Case("bare, arguments first", '{"parameters": {"a": 1}, "name": "add"}', [ADD]),
    Case("bare, two", f'{PARIS};{{"name": "add", "parameters": {{"a": 1}}}}', [CALL, ADD]),
    Case("bare, two lines", f'{PARIS}\n{{"name": "add", "parameters": {{"a": 1}}}}\n', [CALL, ADD]),
    Case("bare array", f"[{PARIS}, {PARIS}]", [CALL, CALL]),
    Case("bare in prose", f"I call {PARIS} now.", [CALL], "I call now."),
    Case("bare, no arguments, known", '{"name": "get_time"}', [("get_time", {})]),
    prose("bare, no arguments, tools unknown", '{"name": "get_time"}', tools=None),
    Case("bare, tools unknown", '{"name": "zap", "parameters": {"x": 1}}', [("zap", {"x": 1})], tools=None),
    prose("bare, unknown tool", '{"name": "zap", "parameters": {"x": 1}}'),
    prose("bare, unknown tool after its arguments", '{"parameters": {"x": 1}, "name": "zap"}'),
    prose("not a call", '{"name":"Alice","age":31}'),
    prose("not a call, tools unknown", '{"name":"Alice","age":31}', tools=None),
    prose("not a call but a tool's name", '{"name": "add", "description": "adds"}'),
    prose("a list of people", '[{"name": "Alice"}, {"name": "Bob"}]'),
    prose("a call quoted", f"`{PARIS}`"),
    prose(
        "JSON and brackets", 'Use {"a": [1, {"name": 2}]} or { x } or [link](http://x) or [1]: {{"name": 3}}.'
    ),
    prose("cut bare", '{"name": "get_weather", "parameters": {"city": '),
    Case(
        "cut in a string",
        '{"name": "get_weather", "parameters": {"city": "Par',
        [("get_weather", {"city": "Par"})],
    ),
    Case("fenced", f"```json\n{PARIS}\n```", [CALL]),
    Case("fenced in prose", f"So:\n```\n{PARIS}\n```\nDone.", [CALL], "So:\nDone."),
    Case("fenced, closing fence missing", f"```json\n{PARIS}\n", [CALL]),
    prose("fenced code", '```python\nx = {"a": 1}\n```\n'),
    prose("fenced object", '```json\n{"a": 1}\n```'),
    prose("an inline fence", 'Like ```{"name": "add", "parameters": {}}```.'),
    Case("function tag", '<function=add>{"a": 1}</function>', [ADD]),
    Case(
        "function tags",
        '<function=add>{"a": 1}</function>\n<function=get_time>{}</function>',
        [ADD, ("get_time", {})],
    ),
    Case("function tag without its end", '<function=add>{"a": 1}', [ADD]),
    prose("function tag, malformed", "<function=add>a=1</function>"),
    Case(
        "Python", '[get_weather(city="Paris"), add(a=1)]', [CALL, ADD], raw=['{"city": "Paris"}', '{"a": 1}']
    ),
    Case("Python, no arguments", "[get_time()]", [("get_time", {})]),
    Case("Python after prose", 'Sure:\n[get_weather(city="Paris")]\nDone.', [CALL], "Sure:\nDone."),
    Case("Python between tags", "<|python_start|>[zap(x=1)]<|python_end|>", [("zap", {"x": 1})]),
    Case(
        "Python values",
        "[search(tags=['a', \"b\"], limit=None, exact=True, options={'a': (1, -2.5), 3: {}, }, page=.5,)]",
        [
            (
                "search",
                {
                    "tags": ["a", "b"],
                    "limit": None,
                    "exact": True,
                    "options": {"a": [1, -2.5], "3": {}},
                    "page": 0.5,
                },
            )
        ],
    ),
    Case(
        "Python strings",
        r"""[search(query='it\'s "é"\n\x41\u00e9\U0001F600\q', zip='''a'"b''', tags=['', "", """
        + '"""x"""])]',
        [("search", {"query": 'it\'s "é"\nAé😀\\q', "zip": "a'\"b", "tags": ["", "", "x"]})],
    ),
    Case(
        "Python, spaces and lines",
        "[ add( a = 1 ,\n b = +2. ) ,\n get_time( ) ]",
        [("add", {"a": 1, "b": 2.0}), ("get_time", {})],
    ),
    Case(
        "Python, line breaks in strings",
        "[search(query='a\\\nb\nc', zip='\\ud83d\\xzz\\U00110000')]",
        [("search", {"query": "ab\nc", "zip": "\ud83d\\xzz\\U00110000"})],
    ),
    prose("Python, unknown tool", "[zap(x=1)]"),
    Case("Python, tools unknown", "[zap(x=1)]", [("zap", {"x": 1})], tools=None),
    prose("Python, positional", "[add(1, 2)]"),
    prose("Python, names for values", "[add(a=b)]"),
    prose("Python in a line", "x = [add(a=1)]"),
    prose("Python, cut", "[add(a="),
    prose("Python, cut in a number", "[add(a=1"),
    Case("Python, cut in a string", "[search(query='it\\", [("search", {"query": "it"})]),
    Case("Python, cut in an escape", "[search(query='it\\u00", [("search", {"query": "it"})]),
    Case("Python, cut between arguments", "[add(a=1, b", [ADD]),
    Case("Python, second malformed", "[add(a=1), add(2)]", [ADD], ", add(2)]"),
    Case("Python, malformed later", "[add(a=1, b=two)]", [ADD], ", b=two)]"),
    prose("whitespace", " \n [ \n { "),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("llama", case)
