"""The command lines of the server guide, with `mlxd` in the place of `vllm-mlx`, and what they configure."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from mlxd import cli
from mlxd.cli import serve
from mlxd.config import Config

COMMANDS: dict[str, dict[str, Any]] = {
    "serve mlx-community/Llama-3.2-3B-Instruct-4bit --port 8000": {"server.port": 8000},
    "serve mlx-community/Llama-3.2-3B-Instruct-4bit --port 8000 --continuous-batching": {
        "scheduler.continuous_batching": True
    },
    "serve mlx-community/Llama-3.2-3B-Instruct-4bit --port 8000 --continuous-batching --use-paged-cache": {
        "scheduler.continuous_batching": True,
        "cache.paged": True,
    },
    "serve mlx-community/Llama-3.2-3B-Instruct-4bit --enable-metrics": {"server.metrics": True},
    "serve mlx-community/Qwen3-Coder-Next-235B-A22B-4bit --continuous-batching --enable-auto-tool-choice "
    "--tool-call-parser hermes": {
        "chat.enable_auto_tool_choice": True,
        "chat.tool_call_parser": "hermes",
    },
    "serve mlx-community/Devstral-Small-2507-4bit --enable-auto-tool-choice --tool-call-parser mistral": {
        "chat.tool_call_parser": "mistral"
    },
    "serve mlx-community/Qwen3-8B-4bit --reasoning-parser qwen3": {"chat.reasoning_parser": "qwen3"},
    "serve mlx-community/DeepSeek-R1-Distill-Qwen-7B-4bit --reasoning-parser deepseek_r1": {
        "chat.reasoning_parser": "deepseek_r1"
    },
    "serve model --continuous-batching --stream-interval 1": {"defaults.stream_interval": 1},
    "serve model --continuous-batching --stream-interval 5": {"defaults.stream_interval": 5},
    "serve mlx-community/Qwen3-0.6B-8bit --continuous-batching --use-paged-cache --port 8000": {
        "model.path": "mlx-community/Qwen3-0.6B-8bit"
    },
    "serve mlx-community/Qwen3-0.6B-8bit --continuous-batching --use-paged-cache --api-key your-secret-key "
    "--rate-limit 60 --timeout 120 --port 8000": {
        "limits.rate_limit": 60,
        "limits.timeout_seconds": 120.0,
    },
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Config] = []

    def run_serve(config: Config, *, show_example: bool) -> int:
        served.append(config)
        return 0

    monkeypatch.setattr(serve, "run_serve", run_serve)
    monkeypatch.setattr("os.environ", {})
    words = shlex.split(command)
    assert cli.main(words) == 0
    [config] = served
    assert config.model.path == words[1]
    for key, value in COMMANDS[command].items():
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == value
    if "--api-key" in words:
        assert [entry.key for entry in config.limits.api_keys] == ["your-secret-key"]
