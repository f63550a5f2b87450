"""Arguments, commands and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlxd
from mlxd import cli
from mlxd.cli import flags, serve, settings
from mlxd.config import Config

GUIDE_AND_API_FLAGS = [
    "--port",
    "--host",
    "--api-key",
    "--rate-limit",
    "--timeout",
    "--enable-metrics",
    "--continuous-batching",
    "--use-paged-cache",
    "--cache-memory-mb",
    "--cache-memory-percent",
    "--max-tokens",
    "--default-temperature",
    "--default-top-p",
    "--stream-interval",
    "--mcp-config",
    "--reasoning-parser",
    "--embedding-model",
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "--no-continuous-batching",
    "--no-use-paged-cache",
    "--served-model-name",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--max-step-ms",
    "--max-model-len",
    "--block-size",
    "--max-queue",
    "--log-level",
    "--log-format",
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, bool]]:
    """What would have been served."""
    calls: list[tuple[Config, bool]] = []

    def run_serve(config: Config, *, show_example: bool) -> int:
        calls.append((config, show_example))
        return 0

    monkeypatch.setattr(serve, "run_serve", run_serve)
    for name in [name for name in os.environ if name.startswith("MLXD_")]:
        monkeypatch.delenv(name)
    return calls


def test_every_flag_of_the_guide_and_the_api_page_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert [name for name in GUIDE_AND_API_FLAGS if not re.search(rf"{name}\b", text)] == []


def test_defaults_are_the_guides() -> None:
    by_flag = {flag.name: flags.default_of(flag.key) for flag in flags.FLAGS}
    guide = {
        "--port": 8000,
        "--host": "0.0.0.0",
        "--api-key": (),
        "--rate-limit": 0,
        "--timeout": 300,
        "--enable-metrics": False,
        "--cache-memory-mb": None,
        "--cache-memory-percent": 0.20,
        "--max-tokens": 32768,
        "--default-temperature": None,
        "--default-top-p": None,
        "--stream-interval": 1,
        "--mcp-config": None,
        "--reasoning-parser": None,
        "--embedding-model": None,
        "--enable-auto-tool-choice": False,
        "--tool-call-parser": None,
    }
    assert {name: by_flag[name] for name in guide} == guide
    # Batching and paging are how mlxd works, so both are on.
    assert by_flag["--continuous-batching"] is True
    assert by_flag["--use-paged-cache"] is True


@pytest.mark.parametrize(
    ("command", "flag", "default"),
    [
        ("serve", "--host", "0.0.0.0"),
        ("demo", "--host", "127.0.0.1"),
        ("demo", "--cache-memory-mb", "1024"),
        # "none" is a value of these two, and turns them off.
        ("serve", "--tool-call-parser", "what the model's template shows"),
        ("serve", "--reasoning-parser", "what the model's template shows"),
        ("serve", "--default-temperature", "the model's, else 1.0"),
        ("serve", "--mcp-config", "none"),
    ],
)
def test_help_says_what_holds_where_nobody_sets_a_flag(
    capsys: pytest.CaptureFixture[str], command: str, flag: str, default: str
) -> None:
    assert cli.main([command, "--help"]) == 0
    entry = " ".join(capsys.readouterr().out.partition(f"\n  {flag} ")[2].split())
    assert entry.partition("(default: ")[2].startswith(f"{default})")


def test_every_flag_sets_its_key(served: list[tuple[Config, bool]]) -> None:
    arguments = [
        "--host",
        "h",
        "--port",
        "1",
        "--api-key",
        "a",
        "--api-key",
        "b",
        "--rate-limit",
        "3",
        "--timeout",
        "4",
        "--enable-metrics",
        "--no-continuous-batching",
        "--no-use-paged-cache",
        "--cache-memory-mb",
        "5",
        "--cache-memory-percent",
        "0.6",
        "--max-tokens",
        "7",
        "--default-temperature",
        "0.8",
        "--default-top-p",
        "0.9",
        "--stream-interval",
        "10",
        "--reasoning-parser",
        "qwen3",
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "mistral",
        "--mcp-config",
        "mcp.json",
        "--served-model-name",
        "m",
        "--served-model-name",
        "n",
        "--max-num-seqs",
        "11",
        "--max-num-batched-tokens",
        "12",
        "--max-step-ms",
        "13",
        "--max-model-len",
        "14",
        "--block-size",
        "15",
        "--max-queue",
        "16",
        "--log-level",
        "error",
        "--log-format",
        "json",
        "--embedding-model",
        "demo:minilm",
        "--set",
        "server.backlog=17",
    ]
    assert cli.main(["serve", "the/model", *arguments]) == 0
    config, show_example = served[0]
    assert not show_example
    assert config.model.path == "the/model"
    values = {
        f"{section}.{name}": getattr(getattr(config, section), name)
        for section, name in (key.split(".") for key in settings.KEY_TYPES)
    }
    changed = {key: value for key, value in values.items() if value != flags.default_of(key)}
    api_keys = changed.pop("limits.api_keys")
    assert [(entry.name, entry.key) for entry in api_keys] == [("default", "a"), ("key-2", "b")]
    assert changed == {
        "model.path": "the/model",
        "model.served_names": ("m", "n"),
        "model.max_model_len": 14,
        "server.host": "h",
        "server.port": 1,
        "server.backlog": 17,
        "server.metrics": True,
        "limits.rate_limit": 3,
        "limits.timeout_seconds": 4.0,
        "defaults.max_tokens": 7,
        "defaults.temperature": 0.8,
        "defaults.top_p": 0.9,
        "defaults.stream_interval": 10,
        "scheduler.continuous_batching": False,
        "scheduler.max_num_seqs": 11,
        "scheduler.max_num_batched_tokens": 12,
        "scheduler.max_step_ms": 13.0,
        "scheduler.max_queue": 16,
        "cache.paged": False,
        "cache.memory_mb": 5,
        "cache.memory_percent": 0.6,
        "cache.block_size": 15,
        "chat.reasoning_parser": "qwen3",
        "chat.enable_auto_tool_choice": True,
        "chat.tool_call_parser": "mistral",
        "mcp.config": "mcp.json",
        "log.level": "error",
        "log.format": "json",
        "embeddings.model": "demo:minilm",
    }
    assert {flag.key for flag in flags.FLAGS} <= {*changed, "limits.api_keys"}


def test_flags_win_over_variables_over_the_file(
    served: list[tuple[Config, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("model: {path: from-file}\nserver: {port: 1, host: a, backlog: 5}\n")
    monkeypatch.setenv("MLXD_SERVER_PORT", "2")
    monkeypatch.setenv("MLXD_SERVER_HOST", "b")
    assert cli.main(["-c", str(path), "--port", "3"]) == 0
    config, _ = served[0]
    assert config.model.path == "from-file"
    assert (config.server.port, config.server.host, config.server.backlog) == (3, "b", 5)


def test_demo(served: list[tuple[Config, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXD_MODEL_PATH", "another/model")
    assert cli.main(["demo", "--port", "0"]) == 0
    config, show_example = served[0]
    assert show_example
    assert config.model.path == "demo:smollm2"
    assert config.model.served_names == ("smollm2-135m-instruct",)
    assert (config.server.host, config.server.port) == ("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--version"], 0, f"mlxd {mlxd.__version__}"),
        (["--help"], 0, "serve MODEL"),
        ([], 2, "usage: mlxd"),
        (["srve"], 2, "srve: no such command; did you mean serve?"),
        (["serve"], 2, "model.path: no model is given"),
        (["serve", "m", "--prot", "1"], 2, "--prot: no such argument; did you mean --port?"),
        (["serve", "m", "--port"], 2, "expected one argument"),
        (["serve", "m", "--port", "x"], 2, "--port: server.port: 'x' is not allowed; expected an integer"),
        (["serve", "m", "--set", "server.port"], 2, "--set server.port: expected SECTION.KEY=VALUE"),
        (["serve", "m", "--set", "a.b=1"], 2, "--set: a.b: no such section"),
        (["serve", "m", "n"], 2, "n: no such argument"),
        (["demo", "-c", "x"], 2, "-c: no such argument"),
        (["-c", "/none/such.yaml"], 2, "/none/such.yaml: cannot be read: No such file or directory"),
    ],
)
def test_exit_codes_and_words(
    arguments: list[str],
    code: int,
    expected: str,
    served: list[tuple[Config, bool]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert expected in (captured.err if code else captured.out)
    assert "Traceback" not in captured.err
    assert not served


def test_playback_needs_no_model(served: list[tuple[Config, bool]]) -> None:
    assert cli.main(["serve", "--set", "worker.backend=playback"]) == 0


def test_an_interrupt_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: Config, *, show_example: bool) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "run_serve", interrupt)
    assert cli.main(["demo"]) == 1


def test_a_reader_that_leaves_is_no_traceback() -> None:
    script = "import sys, mlxd.cli; sys.exit(mlxd.cli.main(['check', '--set', 'worker.backend=playback']))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PATH": ""}
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert errors == b""


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """`mlxd serve` listens in under a second: no rich without a terminal, and never mlx."""
    script = """
import sys
import mlxd.cli.serve, mlxd.cli.settings, mlxd.cli.flags
mlxd.cli._config("demo", mlxd.cli._command_parser("demo").parse_args([]))
heavy = {"mlx", "mlx_lm", "numpy", "rich", "transformers", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
