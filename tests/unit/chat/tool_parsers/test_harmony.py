"""harmony: messages with a channel and perhaps a recipient."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

CALL = ("get_weather", {"city": "Paris"})
PARIS = '{"city": "Paris"}'
HEADER = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>"
WEATHER = HEADER.format("get_weather")
START = "<|start|>assistant"

CASES = [
    Case("one", f"{WEATHER}{PARIS}<|call|>", [CALL], raw=[PARIS]),
    Case("the end left out", f"{WEATHER}{PARIS}", [CALL]),
    Case(
        "after thinking",
        f"<|channel|>analysis<|message|>Hm.<|end|>{START}{WEATHER}{PARIS}<|call|>",
        [CALL],
        reasoning="Hm.",
    ),
    Case(
        "after a preamble",
        f"<|channel|>commentary<|message|>I look.<|end|>{START}{WEATHER}{PARIS}<|call|>",
        [CALL],
        "I look.",
    ),
    Case(
        "thinking and an answer",
        f"<|channel|>analysis<|message|>Hm.<|end|>{START}<|channel|>final<|message|>Hi.<|return|>",
        content="Hi.",
        reasoning="Hm.",
    ),
    Case("an answer", "<|channel|>final<|message|>Hi.", content="Hi."),
    Case(
        "recipient before the channel",
        f"{START} to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{PARIS}<|call|>",
        [CALL],
    ),
    Case(
        "begun in the prompt",
        f" to=functions.get_weather<|channel|>commentary<|message|>{PARIS}<|call|>",
        [CALL],
    ),
    Case(
        "on the analysis channel",
        f"<|channel|>analysis to=functions.get_weather<|message|>{PARIS}<|call|>",
        [CALL],
    ),
    Case(
        "no constraint", f"<|channel|>commentary to=functions.get_weather<|message|>{PARIS}<|call|>", [CALL]
    ),
    Case(
        "two",
        f'{WEATHER}{PARIS}<|call|>{START}{HEADER.format("add")}{{"a": 1}}<|call|>',
        [CALL, ("add", {"a": 1})],
    ),
    Case(
        "a call, then an answer",
        f"{WEATHER}{PARIS}<|call|>{START}<|channel|>final<|message|>Hi.",
        [CALL],
        "Hi.",
    ),
    Case(
        "two thoughts, two texts",
        "<|channel|>analysis<|message|>A<|end|>" * 2 + "<|channel|>final<|message|>B<|end|>" * 2,
        content="B\nB",
        reasoning="A\nA",
    ),
    Case(
        "text on both sides of a call",
        f"<|channel|>final<|message|>A<|end|>{WEATHER}{PARIS}<|call|><|channel|>final<|message|>B",
        [CALL],
        "A\nB",
    ),
    Case(
        "a tool of another kind",
        '<|channel|>commentary to=browser.search<|message|>{"query": "a"}<|call|>',
        [("browser.search", {"query": "a"})],
    ),
    Case("no arguments", f"{HEADER.format('get_time')}{{}}<|call|>", [("get_time", {})]),
    Case("an empty body", f"{HEADER.format('get_time')}<|call|>", [("get_time", {})]),
    Case(
        "braces and markers in a string",
        f'{HEADER.format("search")}{{"query": "}}<|x|><|cal"}}<|call|>',
        [("search", {"query": "}<|x|><|cal"})],
    ),
    Case("unknown tool", f'{HEADER.format("zap")}{{"x": 1}}<|call|>', [("zap", {"x": 1})]),
    Case("cut in a string", f'{WEATHER}{{"city": "Pa', [("get_weather", {"city": "Pa"})]),
    Case("ended in a string", f'{WEATHER}{{"city": "Pa<|call|>', [("get_weather", {"city": "Pa"})]),
    prose("cut before a value", f'{WEATHER}{{"city": '),
    prose("malformed", f"{WEATHER}city=Paris"),
    Case("malformed, ended", f"{WEATHER}city=Paris<|call|>", content=f"{WEATHER}city=Paris"),
    Case(
        "malformed later", f'{HEADER.format("add")}{{"a": 1, b: 2}}<|call|>', [("add", {"a": 1})], ", b: 2}"
    ),
    Case("junk after the arguments", f"{WEATHER}{PARIS} and\nmore<|call|>", [CALL], " and\nmore".strip()),
    Case("cut in a thought", "<|channel|>analysis<|message|>Hm", reasoning="Hm"),
    prose("no frames", "Hello <| world"),
    prose("not a call", '{"name":"Alice","age":31}'),
    prose("whitespace", " a \n "),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("harmony", case)
