"""`mlxd parse`: what the API would make of a model's output, for whoever debugs a model's format.

It does not know servers, models or the parsers themselves.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from mlxd.api.openai.message import ROLE_DELTA, event_delta, whole_message
from mlxd.chat import tool_parsers
from mlxd.chat.format import AnswerFormat
from mlxd.chat.reasoning import formats
from mlxd.chat.tools import FREE_CHOICE, read_tools
from mlxd.chat.types import Event, ToolSpec
from mlxd.errors import ConfigError, InvalidRequestError
from mlxd.text.markers import MarkerScanner

MAX_RANDOM_PIECE = 8

Pieces = Callable[[str], Iterable[str]]
"""Cuts a text."""


class Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of --jsonl. What is left out is what the flags say. `prompt` is the end of the prompt."""

    parser: str | None = None
    reasoning_parser: str | None = None
    tools: list[Any] | None = None
    text: str | None = None
    pieces: list[str] | None = None
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the flags say."""

    parser: str | None
    reasoning_parser: str | None
    tools: tuple[ToolSpec, ...]
    prompt: str | None
    cut: Pieces
    seed: int
    deltas: bool


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` the flags of the command."""
    parser.add_argument("--tool-call-parser", metavar="NAME", help="format of the tool calls (default: none)")
    parser.add_argument("--reasoning-parser", metavar="NAME", help="format of the thinking (default: none)")
    parser.add_argument(
        "--tools", type=Path, metavar="FILE", help="the request's tools, a JSON list: they decide types"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="how the prompt ended, to see whether it opened a block of thinking (default: unknown)",
    )
    parser.add_argument(
        "--chunk", metavar="N|random", help="feed the text in pieces of N characters, or of random sizes"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random sizes and calls' ids")
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help='read a JSON object a line: {"parser", "reasoning_parser", "tools", "prompt", and "text" or '
        '"pieces"}; answer a line each: {"content", "reasoning", "tool_calls": [{"name", "arguments"}]}',
    )
    parser.add_argument(
        "--deltas", action="store_true", help="answer with the list of deltas that a stream would carry"
    )


def run_parse(options: argparse.Namespace, source: BinaryIO, sink: BinaryIO) -> int:
    """Reads all of `source`, writes to `sink`. Returns the exit code.

    Raises ConfigError for names, files and lines that cannot be used.
    """
    settings = _Settings(
        parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        tools=_tools(_read_tools_file(options.tools), str(options.tools)) if options.tools else (),
        prompt=options.prompt,
        cut=_cutter(options.chunk, options.seed),
        seed=options.seed,
        deltas=options.deltas,
    )
    if not options.jsonl:
        events = _parse(Line(text=source.read().decode("utf-8", "replace")), settings, "standard input")
        _write(_deltas(events) if settings.deltas else whole_message(events), sink, indent=2)
        return 0
    for number, raw in enumerate(source, 1):
        if raw.strip():
            where = f"line {number}"
            events = _parse(_decode(raw, where), settings, where)
            _write(_deltas(events) if settings.deltas else _summary(whole_message(events)), sink)
    return 0


def _parse(line: Line, settings: _Settings, where: str) -> list[Event]:
    if (line.text is None) is (line.pieces is None):
        raise ConfigError(f"{where}: expected either text or pieces")
    name = line.parser or settings.parser
    thinking = line.reasoning_parser or settings.reasoning_parser
    named = thinking not in (None, formats.AUTO, formats.NONE)
    reasoning = formats.get(str(thinking)) if named else None
    prompt = line.prompt if line.prompt is not None else settings.prompt
    answer = AnswerFormat(
        reasoning=reasoning,
        guesses_reasoning=thinking == formats.AUTO,
        is_open=reasoning is not None and reasoning.is_open_after(prompt),
        tool_parser=None if name in (None, formats.NONE) else tool_parsers.get(str(name)).name,
        tools=settings.tools if line.tools is None else _tools(line.tools, where),
        tool_choice=FREE_CHOICE,
        special_tokens=MarkerScanner(()),
    )
    make_call_id = tool_parsers.call_ids(random.Random(settings.seed))
    pipeline = answer.pipeline(make_call_id, keeps_special_tokens=True)
    pieces = settings.cut(line.text) if line.text is not None else line.pieces or ()
    return [event for piece in pieces for event in pipeline.feed(piece)] + pipeline.finish()


def _deltas(events: Iterable[Event]) -> list[dict[str, Any]]:
    return [ROLE_DELTA, *map(event_delta, events)]


def _summary(message: dict[str, Any]) -> dict[str, Any]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return {
        "content": message["content"],
        "reasoning": message["reasoning"],
        "tool_calls": [{"name": f["name"], "arguments": _arguments(f["arguments"])} for f in functions],
    }


def _arguments(text: str) -> Any:
    """The object; text where Python cannot read it: nested too deeply, or with a number too long."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _cutter(chunk: str | None, seed: int) -> Pieces:
    if chunk is None:
        return lambda text: (text,)
    if chunk == "random":
        source = random.Random(seed)
        return lambda text: _cut(text, lambda: source.randint(1, MAX_RANDOM_PIECE))
    if not (chunk.isascii() and chunk.isdigit() and int(chunk)):
        raise ConfigError(f"--chunk: expected a number of characters from 1, or random, not {chunk!r}")
    size = int(chunk)
    return lambda text: _cut(text, lambda: size)


def _cut(text: str, next_size: Callable[[], int]) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + next_size()
        yield text[start:end]
        start = end


def _decode(raw: bytes, where: str) -> Line:
    try:
        return msgspec.convert(json.loads(raw), Line)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _read_tools_file(path: Path) -> list[Any]:
    try:
        tools = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--tools: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--tools: {path} is not JSON: {error}") from error
    if isinstance(tools, dict):
        tools = tools.get("tools")
    if not isinstance(tools, list):
        raise ConfigError(f"--tools: {path}: expected a list of tools")
    return tools


def _tools(tools: list[Any], where: str) -> tuple[ToolSpec, ...]:
    try:
        return read_tools(map(_openai_tool, tools))
    except InvalidRequestError as error:
        raise ConfigError(f"{where}: {error}") from error


def _openai_tool(tool: Any) -> Any:
    """Tools as Anthropic writes them, or functions alone, are as good."""
    if not isinstance(tool, dict) or "function" in tool or "name" not in tool:
        return tool
    parameters = tool.get("parameters", tool.get("input_schema"))
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": parameters}
    return {"type": "function", "function": function}


def _write(value: Any, sink: BinaryIO, indent: int | None = None) -> None:
    # Half a surrogate pair, which JSON can carry and UTF-8 cannot, is written as JSON's own escape.
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    sink.write(text.encode("utf-8", "backslashreplace") + b"\n")
    sink.flush()
