"""Log lines, as text and as JSON."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from mlxd import log

ACCESS = {
    "client": "10.0.0.7:5123",
    "method": "POST",
    "path": "/v1/chat/completions",
    "status": 200,
    "bytes": 812,
    "duration_ms": 35.123,
    "request_id": "abc",
}


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("mlxd")
    before = (root.handlers[:], root.level, own.level)
    yield
    root.handlers[:], root.level, own.level = before
    own.manager._clear_cache()  # type: ignore[attr-defined]


def record(
    message: str, name: str = "mlxd.engine", level: int = logging.INFO, **extra: object
) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": name, "levelno": level, "levelname": logging.getLevelName(level)})
    made.msg, made.created, made.msecs = message, 1763771291.25, 250.0
    made.__dict__.update(extra)
    return made


def test_text_line() -> None:
    made = record("step done", rows=3, seconds=0.0123456789, note="a b", nothing=None)
    start, _, rest = log.TextFormatter().format(made).partition(": ")
    assert start == "2025-11-22T00:28:11.250Z INFO    mlxd.engine"
    assert rest == 'step done rows=3 seconds=0.0123457 note="a b"'


def test_text_access_line() -> None:
    line = log.TextFormatter().format(record("x", log.ACCESS_LOGGER, **ACCESS))
    expected = 'mlxd.access: 10.0.0.7:5123 "POST /v1/chat/completions" 200 812B 35.1ms request_id=abc'
    assert line.endswith(expected)


def test_an_access_record_without_its_fields_is_an_ordinary_line() -> None:
    assert log.TextFormatter().format(record("hello", log.ACCESS_LOGGER)).endswith("mlxd.access: hello")


@pytest.mark.parametrize("evil", ["a\nINFO fake", "\x1b[31mred", "x\u2028y", "\x85", "\ud800"])
def test_a_text_record_cannot_pass_for_two(evil: str) -> None:
    fields = ACCESS | {"path": evil}
    for line in (
        log.TextFormatter().format(record(evil)),
        log.TextFormatter().format(record("m", field=evil)),
        log.TextFormatter().format(record("m", log.ACCESS_LOGGER, **fields)),
    ):
        assert len(line.splitlines()) == 1
        assert line.isprintable()
        line.encode()


def test_json_line() -> None:
    entry = json.loads(log.JsonFormatter().format(record("done", rows=3, path="/x", where=ValueError("v"))))
    assert entry == {
        "time": "2025-11-22T00:28:11.250Z",
        "level": "info",
        "logger": "mlxd.engine",
        "message": "done",
        "rows": 3,
        "path": "/x",
        "where": "v",
    }


def test_json_access_line_has_the_fields_as_members() -> None:
    entry = json.loads(log.JsonFormatter().format(record("GET /", log.ACCESS_LOGGER, **ACCESS)))
    assert entry.items() >= ACCESS.items()


@pytest.mark.parametrize("value", ["\ud800", 1 << 80, {(1, 2): "x"}])
def test_json_takes_what_orjson_does_not(value: object) -> None:
    entry = json.loads(log.JsonFormatter().format(record("m", value=value)))
    assert entry["message"] == "m"
    assert "value" in entry


def test_an_extra_cannot_replace_the_message() -> None:
    made = record("m")
    made.__dict__["time"] = "never"
    assert json.loads(log.JsonFormatter().format(made))["time"] != "never"


@pytest.mark.parametrize("formatter", [log.TextFormatter(), log.JsonFormatter()])
def test_traces_are_kept(formatter: logging.Formatter) -> None:
    try:
        raise RuntimeError("inner")
    except RuntimeError:
        made = record("bug", exc_info=sys.exc_info(), stack_info="Stack: here")
    line = formatter.format(made)
    assert "RuntimeError: inner" in line
    assert "Stack: here" in line


def test_secrets_are_masked_the_longest_first() -> None:
    for kind in (log.TextFormatter, log.JsonFormatter):
        line = kind(["sk-1", "sk-1234", ""]).format(record("Bearer sk-1234", other="sk-1!"))
        assert "sk-1" not in line and "234" not in line
        assert line.count(log.MASK) == 2


@pytest.mark.parametrize(
    ("level", "own", "others"),
    [("debug", logging.DEBUG, logging.WARNING), ("error", logging.ERROR, logging.ERROR)],
)
def test_setup_sets_levels_of_ours_and_of_others(level: str, own: int, others: int) -> None:
    log.setup(level, stream=io.StringIO())
    assert logging.getLogger("mlxd.engine.scheduler").getEffectiveLevel() == own
    assert logging.getLogger("some.library").getEffectiveLevel() == others


def test_setup_twice_logs_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    log.setup(stream=first)
    log.setup(format="json", stream=second)
    logging.getLogger("mlxd.x").info("hello %s", "you")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["message"] == "hello you"


def test_without_a_stream_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    logging.getLogger("mlxd.x").warning("seen")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("WARNING mlxd.x: seen\n")
