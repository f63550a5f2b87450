"""`mlxd parse`: what the API would make of a text, whole and in pieces."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from mlxd import cli

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TEXT = f"<think>hm</think>Look:\n{CALL}"
SCHEMA = {"properties": {"n": {"type": "string"}}}
HERMES = ["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]


class StandardStream:
    """Stands for sys.stdin or sys.stdout."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)

    def flush(self) -> None:
        pass


def run(monkeypatch: pytest.MonkeyPatch, text: str | bytes, *flags: str) -> bytes:
    stdout = StandardStream()
    monkeypatch.setattr("sys.stdin", StandardStream(text.encode() if isinstance(text, str) else text))
    monkeypatch.setattr("sys.stdout", stdout)
    assert cli.main(["parse", *flags]) == 0
    return stdout.buffer.getvalue()


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *flags: str
) -> str:
    monkeypatch.setattr("sys.stdin", StandardStream(text.encode()))
    assert cli.main(["parse", *flags]) == 2
    return capsys.readouterr().err


def lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("chunk", [(), ("--chunk", "1"), ("--chunk", "7"), ("--chunk", "random")])
def test_a_message_as_the_api_gives_it(monkeypatch: pytest.MonkeyPatch, chunk: tuple[str, ...]) -> None:
    message = json.loads(run(monkeypatch, TEXT, *HERMES, *chunk))
    [call] = message.pop("tool_calls")
    assert message == {
        "role": "assistant",
        "content": "Look:",
        "refusal": None,
        "reasoning": "hm",
        "reasoning_content": "hm",
    }
    assert call["id"].startswith("call_") and len(call["id"]) == 29
    assert (call["type"], call["function"]["name"]) == ("function", "f")
    assert json.loads(call["function"]["arguments"]) == {"a": 1}


def test_without_parsers_text_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    message = json.loads(run(monkeypatch, TEXT + "\n"))
    assert (message["content"], message["reasoning"]) == (TEXT + "\n", None)
    assert "tool_calls" not in message


def test_jsonl_takes_what_a_line_says_before_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        {"text": TEXT},
        {"parser": "mistral", "text": '[TOOL_CALLS]g{"b": 2}'},
        {"parser": "none", "reasoning_parser": "none", "text": TEXT},
        {"pieces": ["<th", "ink>a", "</think>b"]},
        {"parser": None, "tools": None, "prompt": None, "text": "a</think>b"},
        {"prompt": "<think>\n\n</think>\n\n", "text": "a"},
        {"reasoning_parser": "none", "text": '<tool_call>{"name": "f", "arguments": {"a": 1, "b": 12'},
        {"text": ""},
    ]
    source = "\n\n".join(json.dumps(line) for line in asked) + "\n"
    assert lines(run(monkeypatch, source, "--jsonl", *HERMES)) == [
        {"content": "Look:", "reasoning": "hm", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"content": None, "reasoning": None, "tool_calls": [{"name": "g", "arguments": {"b": 2}}]},
        {"content": TEXT, "reasoning": None, "tool_calls": []},
        {"content": "b", "reasoning": "a", "tool_calls": []},
        {"content": "b", "reasoning": "a", "tool_calls": []},
        {"content": "a", "reasoning": None, "tool_calls": []},
        {"content": None, "reasoning": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"content": "", "reasoning": None, "tool_calls": []},
    ]


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_arguments_that_python_cannot_read_stay_text(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": {value}}}}}</tool_call>'
    [answer] = lines(run(monkeypatch, json.dumps({"text": text}), "--jsonl", "--tool-call-parser", "hermes"))
    assert answer["tool_calls"] == [{"name": "f", "arguments": f'{{"a": {value}}}'}]


@pytest.mark.parametrize("chunk", ["1", "random"])
def test_deltas_join_to_the_message(monkeypatch: pytest.MonkeyPatch, chunk: str) -> None:
    source = json.dumps({"text": TEXT})
    [deltas] = lines(run(monkeypatch, source, "--jsonl", "--deltas", "--chunk", chunk, *HERMES))
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == "Look:"
    assert "".join(d.get("reasoning", "") for d in deltas) == "hm"
    calls = [call for d in deltas for call in d.get("tool_calls", ())]
    assert calls[0]["function"] == {"name": "f", "arguments": ""} and calls[0]["index"] == 0
    assert json.loads("".join(c["function"]["arguments"] for c in calls)) == {"a": 1}
    assert all("id" not in call for call in calls[1:])
    whole = json.loads(run(monkeypatch, TEXT, "--deltas", *HERMES))
    assert {"reasoning": "hm", "reasoning_content": "hm"} in whole


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        {"tools": [{"name": "f", "input_schema": SCHEMA}]},
        [{"name": "f", "parameters": SCHEMA}],
    ],
)
def test_tools_decide_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tools: Any) -> None:
    text = "<tool_call><function=f><parameter=n>1</parameter></function></tool_call>"
    flags = ["--jsonl", "--tool-call-parser", "qwen3_coder"]
    source = json.dumps({"text": text})
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(tools), encoding="utf-8")
    [typed] = lines(run(monkeypatch, source, *flags, "--tools", str(file)))
    [guessed] = lines(run(monkeypatch, source, *flags))
    assert typed["tool_calls"] == [{"name": "f", "arguments": {"n": "1"}}]
    assert guessed["tool_calls"] == [{"name": "f", "arguments": {"n": 1}}]


def test_the_end_of_the_prompt_says_whether_a_block_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--reasoning-parser", "glm4"]
    assert json.loads(run(monkeypatch, "a</think>b", *flags))["reasoning"] is None
    assert json.loads(run(monkeypatch, "a</think>b", *flags, "--prompt", "x<think>\n"))["reasoning"] == "a"


def test_text_of_any_kind_comes_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(run(monkeypatch, b"\xff\xc3\xa9"))["content"] == "\ufffdé"
    [answer] = lines(run(monkeypatch, '{"text": "\\ud800é"}', "--jsonl"))
    assert answer["content"] == "\ud800é"


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        ("", ("--chunk", "0"), "--chunk: expected"),
        ("", ("--chunk", "-1"), "--chunk: expected"),
        ("", ("--tool-call-parser", "mistrel"), "did you mean mistral?"),
        ("", ("--reasoning-parser", "quen"), "no reasoning parser is called 'quen'"),
        ("", ("--tools", "/nowhere.json"), "/nowhere.json cannot be read"),
        ("nonsense", ("--jsonl",), "line 1: "),
        ("[1]", ("--jsonl",), "line 1: "),
        ('{"text": "a"}\n{"text": "a", "pieces": []}', ("--jsonl",), "line 2: expected either"),
        ("{}", ("--jsonl",), "line 1: expected either text or pieces"),
        ('{"text": 5}', ("--jsonl",), "line 1: "),
        ('{"txt": "a"}', ("--jsonl",), "line 1: "),
        ('{"text": "", "tools": [{"name": ""}]}', ("--jsonl",), "line 1: tools[0].function.name"),
    ],
)
def test_mistakes_are_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    flags: tuple[str, ...],
    problem: str,
) -> None:
    assert problem in refusal(monkeypatch, capsys, text, *flags)


@pytest.mark.parametrize("content", ["{}", "5", "nonsense"])
def test_a_file_of_tools_is_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str
) -> None:
    file = tmp_path / "tools.json"
    file.write_text(content, encoding="utf-8")
    assert "--tools: " in refusal(monkeypatch, capsys, "", "--tools", str(file))
