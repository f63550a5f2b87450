"""`mlxd check`: prints the resolved configuration and what the models take, and starts nothing.

It does not know how that is found out: worker processes that load no weights say it as JSON.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import yaml

from mlxd.cli import EXIT_USAGE
from mlxd.cli.serve import is_exposed, memory_line
from mlxd.cli.settings import masked, resolve_secrets
from mlxd.cli.worker_tool import ToolError, run_tool
from mlxd.config import Config
from mlxd.mcp.servers_file import read_servers
from mlxd.step import MemoryPlan

PLAN_MODULE = "mlxd.worker.plan"
EMBEDDING_PLAN_MODULE = "mlxd.worker.embeddings.plan"


def run_check(config: Config) -> int:
    """Prints to standard output. Returns 0, or 2 when the server could not start so. Raises ConfigError."""
    resolve_secrets(config, os.environ)
    print(yaml.safe_dump(masked(config), sort_keys=False, allow_unicode=True), end="")
    if is_exposed(config):
        print(f"# {config.server.host} is open to the network and no API key is set")
    if config.mcp.config is not None:
        servers = read_servers(Path(config.mcp.config), os.environ)
        print(f"# MCP servers: {', '.join(f'{spec.name} ({spec.transport})' for spec in servers) or 'none'}")
    lines, fits = plan_lines(config)
    more_lines, more_fits = embedding_lines(config)
    for line in (*lines, *more_lines):
        print(f"# {line}")
    return 0 if fits and more_fits else EXIT_USAGE


def plan_lines(config: Config) -> tuple[list[str], bool]:
    """The memory plan in words, then what it warns of; and whether it fits. What cannot be planned yet is
    said, and fits."""
    if config.model.path is None:
        return ["memory plan: no model is given"], True
    if config.worker.backend == "playback":
        return ["memory plan: the playback worker holds no model"], True
    facts = _plan(PLAN_MODULE, config)
    if "error" in facts:
        return [f"memory plan: {facts['error']}"], not facts.get("fatal", False)
    plan = msgspec.convert(facts["memory"], MemoryPlan)
    return [memory_line(plan), *msgspec.convert(facts["warnings"], list[str])], True


def embedding_lines(config: Config) -> tuple[list[str], bool]:
    """The same of the embedding model, where there is one. Its weights come beside the memory plan."""
    if config.embeddings.model is None:
        return [], True
    facts = _plan(EMBEDDING_PLAN_MODULE, config)
    if "error" in facts:
        return [f"embeddings: {facts['error']}"], not facts.get("fatal", False)
    kind = "cross-encoder, " if facts["is_cross_encoder"] else ""
    weights_bytes, max_model_len = msgspec.convert(
        (facts["weights_bytes"], facts["max_model_len"]), tuple[int, int]
    )
    about = f"{config.embeddings.names[0]}, {kind}{facts['dtype']}, inputs of {max_model_len:,} tokens"
    return [f"embeddings: {about}, {weights_bytes / 1e9:.2f} GB weights"], True


def _plan(module: str, config: Config) -> dict[str, object]:
    """What a tool says of `config`."""
    try:
        return run_tool(module, msgspec.json.encode(without_keys(config)))
    except ToolError as error:
        return {"error": f"not known: {error}", "fatal": False}


def without_keys(config: Config) -> Config:
    """`config` for another process, which has no use for API keys."""
    return msgspec.structs.replace(config, limits=msgspec.structs.replace(config.limits, api_keys=()))
