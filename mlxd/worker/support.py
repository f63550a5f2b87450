"""Which models the paged cache can serve, and what their layers keep of a token.

It does not know the pool or the step: it reads shapes and call patterns off mlx-lm's own code, by building
graphs that are never evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxd.errors import MlxdError
from mlxd.worker.patching import patch_attention


class UnsupportedModelError(MlxdError):
    """mlxd cannot serve this architecture with its paged cache. The message says why."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: `num_kv_heads` keys of `key_dim` and values of `value_dim`."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def values_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class _ProbeCache:
    """Stands where a layer's cache will be and writes down how the model uses it."""

    def __init__(self, num_rows: int) -> None:
        self.offset = mx.zeros((num_rows,), dtype=mx.int32)
        self.shapes: list[tuple[int, ...]] = []
        self.num_attention_calls = 0
        self.obstacle: str | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shapes = [keys.shape, values.shape]
        return keys, values

    def make_mask(self, length: int, *, window_size: int | None = None, **_: object) -> None:
        if window_size is not None:
            self.obstacle = f"a sliding window of {window_size} tokens"

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: object = None,
        sinks: mx.array | None = None,
        softcap: float | None = None,
    ) -> mx.array:
        self.num_attention_calls += 1
        if [keys.shape, values.shape] != self.shapes:
            self.obstacle = "other keys and values than it caches (latent attention)"
        if mask is not None:
            self.obstacle = "a mask of its own"
        if sinks is not None:
            self.obstacle = "attention sinks"
        return mx.zeros((*queries.shape[:-1], values.shape[-1]), dtype=queries.dtype)


def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """The shapes of each layer's cache, from a graph of mlx-lm's own that is never evaluated.

    Raises UnsupportedModelError when a layer has anything but mlx-lm's plain `KVCache`.
    """
    caches = make_prompt_cache(model)
    for cache in caches:
        if type(cache) is not KVCache:
            raise UnsupportedModelError(
                f"{_name(model)} uses mlx-lm's {type(cache).__name__}; so far mlxd pages plain KVCache only"
            )
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    shapes = []
    for cache in caches:
        if cache.keys is None:
            raise UnsupportedModelError(f"{_name(model)} has a layer that never uses its cache")
        shapes.append(LayerShape(cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3]))
    return shapes


def check_supported(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless the model runs flattened, `[N, 1]`, over a paged cache.

    Nothing is computed: two rows with positions of their own go through the model as a graph, and the
    probes see whether every layer calls its attention once, through the name that mlxd replaces.
    """
    shapes = layer_shapes(model)
    patch_attention(model)
    probes: list[Any] = [_ProbeCache(2) for _ in shapes]
    try:
        model(mx.zeros((2, 1), dtype=mx.int32), cache=probes)
    except Exception as error:
        raise UnsupportedModelError(
            f"{_name(model)} cannot take a position per row (in mlx-lm's own code: {error})"
        ) from error
    for index, probe in enumerate(probes):
        if probe.num_attention_calls != 1:
            raise UnsupportedModelError(
                f"{_name(model)} computes the attention of layer {index} where mlxd cannot reach it"
            )
        if probe.obstacle is not None:
            raise UnsupportedModelError(f"{_name(model)} needs {probe.obstacle} in layer {index}")


def kv_bytes_per_token(model: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    return sum(shape.values_per_token for shape in layer_shapes(model)) * dtype.size


def _name(model: nn.Module) -> str:
    return f"model type {getattr(model, 'model_type', type(model).__module__.rsplit('.', 1)[-1])!r}"
