"""gemma4: `call:f{k:<|"|>v<|"|>,n:42}` between its tags; FunctionGemma's tags."""

from __future__ import annotations

from tests.unit.chat.tool_parsers.cases import Case, check, prose, table

CALL = ("get_weather", {"city": "Paris"})
Q = '<|"|>'


def call(body: str) -> str:
    return f"<|tool_call>call:{body}<tool_call|>"


PARIS = call(f"get_weather{{city:{Q}Paris{Q}}}")

CASES = [
    Case(
        "plain JSON",
        '<|tool_call>call:get_weather{"city": "a}\\n\\u00e9", "days": 2}<tool_call|>',
        [("get_weather", {"city": "a}\né", "days": 2})],
    ),
    Case("one", PARIS, [CALL], raw=['{"city": "Paris"}']),
    Case("two", PARIS + PARIS, [CALL, CALL]),
    Case("two, a line break", f"{PARIS}\n{PARIS}", [CALL, CALL]),
    Case("prose around", f"I look. {PARIS} Done.", [CALL], "I look. Done."),
    Case(
        "numbers",
        call(f"get_weather{{city:{Q}Paris{Q},days:42}}"),
        [("get_weather", {"city": "Paris", "days": 42})],
    ),
    Case(
        "all types",
        call(
            f"search{{exact:true,limit:null,options:{{a:{{b:[1,-2.5e3]}},c:{Q}d{Q}}},tags:[{Q}x{Q},{Q}y{Q}]}}"
        ),
        [
            (
                "search",
                {
                    "exact": True,
                    "limit": None,
                    "options": {"a": {"b": [1, -2500.0]}, "c": "d"},
                    "tags": ["x", "y"],
                },
            )
        ],
    ),
    Case(
        "numbers in arrays",
        call("search{tags:[1, 2, 3],options:{a:[true,None]}}"),
        [("search", {"tags": [1, 2, 3], "options": {"a": [True, None]}})],
    ),
    Case("no arguments", call("get_time{}"), [("get_time", {})]),
    Case(
        "empty array and object",
        call("search{options:{},tags:[]}"),
        [("search", {"options": {}, "tags": []})],
    ),
    Case(
        "anything in a string",
        call(f'search{{query:{Q}a,b:c}}]"\\n\n<|x|>{Q}}}'),
        [("search", {"query": 'a,b:c}]"\\n\n<|x|>'})],
    ),
    Case("an empty string", call(f"search{{query:{Q}{Q}}}"), [("search", {"query": ""})]),
    Case("keys in quotes", call(f"search{{options:{{{Q}a b{Q}:1}}}}"), [("search", {"options": {"a b": 1}})]),
    Case(
        "quotes of JSON",
        call('search{query:"a \\"b\\"",tags:["c"]}'),
        [("search", {"query": 'a "b"', "tags": ["c"]})],
    ),
    Case(
        "no quotes",
        call("search{query:San Francisco, limit:5}"),
        [("search", {"query": "San Francisco", "limit": 5})],
    ),
    Case("the schema says string", call("search{zip:94110}"), [("search", {"zip": "94110"})]),
    Case(
        "spaces and lines",
        "<|tool_call>\ncall:add{ a : 1 ,\n b : 2 }\n<tool_call|>",
        [("add", {"a": 1, "b": 2})],
    ),
    Case("unknown tool", call("zap{x:1,y:a,z:true}"), [("zap", {"x": 1, "y": "a", "z": True})]),
    Case("tools unknown", call("zap{x:01,y:None}"), [("zap", {"x": "01", "y": None})], tools=None),
    Case("not closed", "<|tool_call>call:add{a:1}", [("add", {"a": 1})]),
    Case(
        "cut in a string",
        f"<|tool_call>call:search{{limit:1,query:{Q}a b<|",
        [("search", {"limit": 1, "query": "a b"})],
    ),
    Case("cut in a number", "<|tool_call>call:add{a:1,b:2", [("add", {"a": 1})]),
    Case("cut in a key", "<|tool_call>call:add{a:1,b", [("add", {"a": 1})]),
    Case(
        "cut in a nested key",
        f"<|tool_call>call:search{{exact:true,options:{{{Q}a",
        [("search", {"exact": True})],
    ),
    prose("cut in the only number", "<|tool_call>call:add{a:1"),
    prose("cut in the name", "<|tool_call>call:ad"),
    prose("cut marker", "A <|tool_c"),
    prose("malformed", "<|tool_call>add(1)<tool_call|>"),
    prose("no name", call("{a:1}")),
    prose("no value", call("add{a:}")),
    prose("no key", call("add{:1}")),
    Case("malformed later", call("add{a:1,b}"), [("add", {"a": 1})], ",b}<tool_call|>"),
    Case(
        "FunctionGemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
        [CALL],
    ),
    Case(
        "FunctionGemma, two",
        "<start_function_call>call:add{a:1}<end_function_call>" * 2,
        [("add", {"a": 1})] * 2,
    ),
    prose("not a call", '{"name":"Alice","age":31} call:add{a:1}'),
]


@table(CASES)
def test_format(case: Case) -> None:
    check("gemma4", case)
