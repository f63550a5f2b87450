"""Decode attention that multiplies with the blocks where they lie in the pool: nothing is copied.

It does not know MLX's devices; it is the right choice on CPUs, where `mx.gather_mm` is a loop of BLAS calls
that take their matrices by address. One layer, 32 rows, 9 heads over 3, float32, two cores: contexts of 128
and 512 tokens take 0.9 and 4.2 ms, against 1.4 and 6.0 for MLX's own attention over contiguous keys (in the
same run); gathering into contiguous keys first would alone take 0.6 and 14.6.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxd.worker.exponential import exp_nonpositive


class BlockwiseDecode:
    """n rows with one query each. Block tables int32 [n, W]; of each row, tokens start <= t < stop count."""

    def __init__(
        self,
        block_tables: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        stops: npt.NDArray[np.int32],
        block_size: int,
    ) -> None:
        self.num_rows, self._width = block_tables.shape
        self._block_size = block_size
        self._tables = mx.array(block_tables.astype(np.uint32))[:, None, :]
        places = np.arange(self._width * block_size)
        inside = (places >= starts[:, None]) & (places < stops[:, None])
        # [n, 1, W, 1, block_size]; on a CPU a minimum takes a tenth of the time of mx.where.
        self._limit = mx.array(
            np.where(inside, np.inf, -np.inf)
            .astype(np.float32)
            .reshape(self.num_rows, 1, self._width, 1, block_size)
        )
        self._indices: dict[int, tuple[mx.array, mx.array, mx.array]] = {}

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        softcap: float | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """queries [n, num_heads, 1, key_dim], pools of one layer -> [n, num_heads, 1, value_dim]"""
        num_blocks, num_kv_heads, block_size, key_dim = keys.shape
        num_rows, num_heads = queries.shape[:2]
        repeats = num_heads // num_kv_heads
        query_index, block_index, pair_index = self._index(num_kv_heads)
        grouped = (queries * scale).reshape(num_rows * num_kv_heads, repeats, key_dim)
        flat_keys = keys.reshape(num_blocks * num_kv_heads, block_size, key_dim)
        scores = mx.gather_mm(grouped, flat_keys.swapaxes(-1, -2), query_index, block_index)
        scores = scores.astype(mx.float32)  # [n, num_kv_heads, W, repeats, block_size]
        if softcap is not None:
            scores = softcap * mx.tanh(scores / softcap)
        scores = mx.minimum(scores, self._limit)
        largest = scores.max(axis=-1, keepdims=True).max(axis=2, keepdims=True)
        if sinks is not None:
            sink = sinks.astype(mx.float32).reshape(1, num_kv_heads, 1, repeats, 1)
            largest = mx.maximum(largest, sink)
        weights = exp_nonpositive(scores - largest)
        total = weights.sum(axis=-1, keepdims=True).sum(axis=2)  # [n, num_kv_heads, repeats, 1]
        if sinks is not None:
            total = total + exp_nonpositive(sink - largest).squeeze(2)
        weights = weights.astype(values.dtype).reshape(-1, repeats, block_size)
        flat_values = values.reshape(num_blocks * num_kv_heads, block_size, -1)
        parts = mx.gather_mm(weights, flat_values, pair_index, block_index)
        output = parts.sum(axis=2) / total
        return output.astype(queries.dtype).reshape(num_rows, num_heads, 1, -1)

    def _index(self, num_kv_heads: int) -> tuple[mx.array, mx.array, mx.array]:
        """uint32 [n, num_kv_heads, W]: which query matrix, pool matrix and weight matrix make a pair."""
        if num_kv_heads not in self._indices:
            shape = (self.num_rows, num_kv_heads, self._width)
            heads = mx.arange(num_kv_heads, dtype=mx.uint32)[None, :, None]
            queries = mx.arange(shape[0] * shape[1], dtype=mx.uint32).reshape(*shape[:2], 1)
            pairs = mx.arange(shape[0] * shape[1] * shape[2], dtype=mx.uint32).reshape(shape)
            blocks = self._tables * num_kv_heads + heads
            self._indices[num_kv_heads] = (mx.broadcast_to(queries, shape), blocks, pairs)
        return self._indices[num_kv_heads]
