"""What config.json says about a model, whatever its family calls it.

It does not know weights or MLX.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxd.errors import ConfigError

CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "n_ctx",
)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. ConfigError when it is not JSON or names no model type."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"config.json of the model {folder.name!r} cannot be read") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"config.json of the model {folder.name!r} names no model_type")
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part: multimodal configurations nest it."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def context_length(config: dict[str, Any]) -> int | None:
    """The longest sequence the model was made for, in tokens; None where it does not say."""
    values = [text_config(config).get(key) for key in CONTEXT_KEYS]
    return next((int(value) for value in values if isinstance(value, int | float) and value > 0), None)
