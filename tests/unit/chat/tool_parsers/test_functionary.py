"""functionary: messages to recipients (v2 and v3.2) and function tags (v3.1)."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

CALL = ("get_weather", {"city": "Paris"})
ADD = ("add", {"a": 1})
PARIS = '{"city": "Paris"}'


def to(recipient: str, content: str) -> str:
    return f"<|from|>assistant\n<|recipient|>{recipient}\n<|content|>{content}"


CASES = [
    Case("v2", to("get_weather", PARIS), [CALL], raw=[PARIS]),
    Case("v2, two", to("get_weather", PARIS) + "\n" + to("add", '{"a": 1}'), [CALL, ADD]),
    Case("v2, stopped", to("get_weather", PARIS) + "<|stop|>", [CALL]),
    Case("v2, text", to("all", "Hello."), content="Hello."),
    Case("v2, text, then a call", to("all", "I look.\n") + to("get_weather", PARIS), [CALL], "I look."),
    Case("v2, text, stopped", to("all", "Hello.") + "<|stop|>", content="Hello."),
    Case("v2, begun in the prompt", f"get_weather\n<|content|>{PARIS}", [CALL]),
    Case("v2, text, begun in the prompt", "all\n<|content|>Hello.", content="Hello."),
    Case("v2, begun after from", f"<|recipient|>get_weather\n<|content|>{PARIS}", [CALL]),
    Case("v2, no arguments", to("get_time", "{}"), [("get_time", {})]),
    Case("v2, nothing for arguments", to("get_time", ""), [("get_time", {})]),
    Case("v2, unknown tool", to("zap", '{"x": 1}'), [("zap", {"x": 1})]),
    Case("v2, cut in a string", to("search", '{"query": "a'), [("search", {"query": "a"})]),
    Case("v3.2", f">>>get_weather\n{PARIS}", [CALL]),
    Case("v3.2, begun in the prompt", f"get_weather\n{PARIS}", [CALL]),
    Case("v3.2, begun in the prompt, none known", 'zap\n{"x": 1}', [("zap", {"x": 1})], tools=None),
    Case("v3.2, two", f'get_weather\n{PARIS}>>>add\n{{"a": 1}}', [CALL, ADD]),
    Case("v3.2, text", ">>>all\nHello.\n", content="Hello.\n"),
    Case("v3.2, text, begun in the prompt", "all\nHello.", content="Hello."),
    Case("v3.2, text, then a call", f"all\nI look.\n>>>get_weather\n{PARIS}", [CALL], "I look."),
    Case("v3.2, a call, then text", f"get_weather\n{PARIS}>>>all\nDone.", [CALL], "Done."),
    Case(
        "v3.2, arrows in a string", '>>>search\n{"query": ">>>add\\n{"}', [("search", {"query": ">>>add\n{"})]
    ),
    Case("v3.2, cut in a string", 'search\n{"query": "ab', [("search", {"query": "ab"})]),
    prose("v3.2, unknown tool", '>>>zap\n{"x": 1}'),
    prose("v3.2, cut", 'search\n{"query": '),
    prose("v3.2, cut before the arguments", ">>>get_weather\n"),
    prose("v3.2, code", ">>>add\nprint(1)"),
    prose("v3.2, code for a tool unknown", ">>>python\nprint(1)"),
    Case("v3.1", f"<function=get_weather>{PARIS}</function>", [CALL]),
    Case("v3.1, prose around", f"A <function=get_weather>{PARIS}</function> B", [CALL], "A B"),
    prose("plain text", "Hello, how are you?\nFine."),
    prose("one word", "Hello"),
    prose("a word and a line", "Sure\n{x} is it."),
    prose("text about all", "all of it"),
    prose("Python's prompt", "Type:\n>>> x = 1\n>>>\n"),
    prose("half a header", "<|from|>assistant\n<|recipient|>get_weather"),
    prose("no content", "<|recipient|>get_weather\nHello"),
    prose("not a call", '{"name":"Alice","age":31}'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("functionary", case)
