"""From token states to one vector a text: pooling, dense layers and normalisation.

It does not know how the states were computed. What a model wants is in the files that sentence-transformers
writes: modules.json, and a folder for each module. A model without them is pooled in the way usual for its
kind, and normalised.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxd.errors import ConfigError
from mlxd.worker.embeddings.activations import activation

Step = Callable[[mx.array], mx.array]
"""float32 [B, size] -> float32 [B, size']"""

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""In the order in which sentence-transformers joins the vectors of several."""
MODE_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
IGNORED_MODULES = frozenset({"Dropout"})


@dataclass(frozen=True, slots=True)
class Pooler:
    """`modes` of MODES, joined. `include_prompt`: the tokens of a prompt take part."""

    modes: tuple[str, ...]
    include_prompt: bool = True
    steps: tuple[Step, ...] = ()

    def __call__(self, states: mx.array, lengths: mx.array, num_prompt_tokens: mx.array) -> mx.array:
        """states [B, L, hidden_size], int32 [B], int32 [B] -> float32 [B, size]"""
        states = states.astype(mx.float32)
        positions = mx.arange(states.shape[1])[None]
        real = positions < lengths[:, None]
        if not self.include_prompt:
            real = real & (positions >= num_prompt_tokens[:, None])
        parts = []
        for mode in self.modes:
            if mode == "max":
                parts.append(mx.where(real[..., None], states, -mx.inf).max(axis=1))
            else:
                weights = pooling_weights(mode, positions, real, lengths)
                parts.append((weights[:, None] @ states)[:, 0])
        vectors = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        for step in self.steps:
            vectors = step(vectors)
        return vectors


def pooling_weights(mode: str, positions: mx.array, real: mx.array, lengths: mx.array) -> mx.array:
    """float32 [B, L]: how much of each token goes into the vector.

    mean_sqrt_len_tokens divides the sum by the root of the number of tokens; weightedmean weighs a token by
    its position, counted from 1 (Muennighoff 2022, section 3).
    """
    if mode == "cls":
        return mx.broadcast_to(positions == 0, real.shape).astype(mx.float32)
    if mode == "lasttoken":
        return (positions == lengths[:, None] - 1).astype(mx.float32)
    weights = real.astype(mx.float32)
    if mode == "weightedmean":
        weights = weights * (positions + 1)
    total = mx.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    return weights / (mx.sqrt(total) if mode == "mean_sqrt_len_tokens" else total)


def normalise(vectors: mx.array) -> mx.array:
    """Each vector at length 1; a vector of zeros stays one."""
    return vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def read_pooler(folder: Path, *, is_decoder: bool) -> Pooler:
    """The pooler that a model folder asks for.

    Raises:
        ConfigError: a module that is not supported, or whose files are not there.
    """
    modules = read_json(folder / "modules.json", [])
    if not modules:
        return Pooler(("lasttoken" if is_decoder else "mean",), steps=(normalise,))
    modes: tuple[str, ...] = ()
    include_prompt = True
    steps: list[Step] = []
    for module in modules[1:]:
        kind = str(module.get("type", "")).rpartition(".")[2]
        path = folder / str(module.get("path", ""))
        if kind == "Pooling" and not modes:
            config = read_json(path / "config.json", {})
            modes, include_prompt = pooling_modes(config), config.get("include_prompt", True)
        elif kind == "Normalize":
            steps.append(normalise)
        elif kind == "Dense":
            steps.append(read_dense(path))
        elif kind not in IGNORED_MODULES:
            raise ConfigError(f"the embedding model has a module {kind!r}, which mlxd does not support")
    if not modes:
        raise ConfigError("the embedding model's modules.json names no Pooling module")
    return Pooler(modes, include_prompt, tuple(steps))


def pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    """Of a Pooling module, in the form with one flag a mode, or with their names (`pooling_mode`)."""
    named = config.get("pooling_mode")
    if named:
        wanted = {named} if isinstance(named, str) else set(named)
    else:
        wanted = {mode for key, mode in MODE_KEYS.items() if config.get(key)}
    unknown = wanted - set(MODES)
    if unknown:
        raise ConfigError(f"the embedding model pools by {min(unknown)!r}, which mlxd does not support")
    return tuple(mode for mode in MODES if mode in wanted) or ("mean",)


def read_dense(folder: Path) -> Step:
    """A linear layer and its activation."""
    config = read_json(folder / "config.json", {})
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ConfigError(f"the embedding model's {folder.name} has no model.safetensors")
    arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    try:
        function = activation(config.get("activation_function", "tanh"))
        weight = arrays["linear.weight"].astype(mx.float32).T
    except (ValueError, KeyError) as error:
        raise ConfigError(f"the embedding model's {folder.name} cannot be used: {error}") from None
    bias = arrays["linear.bias"].astype(mx.float32) if "linear.bias" in arrays else mx.array(0.0)
    mx.eval(weight, bias)
    return lambda vectors: function(vectors @ weight + bias)


def read_json(path: Path, default: Any) -> Any:
    """The file's content, `default` where there is none. ConfigError when it is not JSON of that kind."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError):
        raise ConfigError(f"the embedding model's {path.name} cannot be read") from None
    if not isinstance(value, type(default)):
        raise ConfigError(f"the embedding model's {path.name} is not what was expected")
    return value
