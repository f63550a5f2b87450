"""Attention over sequences gathered from the pool: prefill chunks everywhere, decode rows without a kernel.

It does not know the step: a chunk is one row's consecutive tokens, a decode group is rows of one query each.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

MAX_SCORES = 1 << 24
"""Scores of a chunk that exist at one time (64 MB in float32); longer chunks go in tiles of queries."""


def gather_sequences(pool: mx.array, tables: mx.array) -> mx.array:
    """pool [num_blocks, num_kv_heads, block_size, dim], tables int32 [n, W] -> [n, num_kv_heads, S, dim]"""
    num_kv_heads = pool.shape[1]
    heads = mx.arange(num_kv_heads, dtype=mx.int32)[None, :, None]
    return pool[tables[:, None, :], heads].reshape(tables.shape[0], num_kv_heads, -1, pool.shape[-1])


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
    softcap: float | None,
) -> mx.array:
    """MLX's attention, [n, num_heads, T, dim] over [n, num_kv_heads, S, dim], with an optional soft-cap.

    A `mask` is bool, broadcast to [n, 1, T, S], or "causal" with the queries at the end of the keys.
    """
    if softcap is None:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    num_rows, num_heads, length, dim = queries.shape
    num_kv_heads, size = keys.shape[1:3]
    if mask == "causal":
        mask = mx.arange(size - length, size)[:, None] >= mx.arange(size)[None]
    grouped = (queries * scale).reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, length, dim)
    scores = (grouped @ keys[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    scores = softcap * mx.tanh(scores / softcap)
    if isinstance(mask, mx.array):
        scores = mx.where(mask[:, :, None] if mask.ndim == 4 else mask, scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1).astype(values.dtype)
    return (weights @ values[:, :, None]).reshape(num_rows, num_heads, length, -1)


class GatherDecode:
    """n rows with one query each. Block tables int32 [n, W], context lengths int32 [n]."""

    def __init__(
        self, block_tables: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32], block_size: int
    ) -> None:
        self.num_rows = len(context_lens)
        self._tables = mx.array(block_tables)
        size = block_tables.shape[1] * block_size
        self._mask = mx.array(np.arange(size)[None] < context_lens[:, None])[:, None, None]

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, softcap: float | None
    ) -> mx.array:
        """queries [n, num_heads, 1, key_dim], pools of one layer -> [n, num_heads, 1, value_dim]"""
        keys = gather_sequences(keys, self._tables)
        values = gather_sequences(values, self._tables)
        return attend(queries, keys, values, scale=scale, mask=self._mask, softcap=softcap)


class ChunkAttention:
    """One row's T consecutive queries, flattened rows start … start + T - 1, at the end of its sequence."""

    def __init__(
        self,
        block_table: npt.NDArray[np.int32],
        start: int,
        length: int,
        context_len: int,
        block_size: int,
    ) -> None:
        self._table = mx.array(block_table[: -(-context_len // block_size)])[None]
        self._start = start
        self._length = length
        self._context_len = context_len

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, softcap: float | None
    ) -> mx.array:
        """queries [N, num_heads, 1, key_dim], pools of one layer -> [T, num_heads, 1, value_dim]"""
        own = queries[self._start : self._start + self._length].squeeze(2).swapaxes(0, 1)[None]
        keys = gather_sequences(keys, self._table)
        values = gather_sequences(values, self._table)
        tile = max(1, MAX_SCORES // (queries.shape[1] * self._context_len))
        outputs = []
        for first in range(0, self._length, tile):
            last = min(first + tile, self._length)
            size = self._context_len - self._length + last
            outputs.append(
                attend(
                    own[:, :, first:last],
                    keys[:, :, :size],
                    values[:, :, :size],
                    scale=scale,
                    mask=None if last - first == 1 else "causal",
                    softcap=softcap,
                )
            )
        output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
        return output[0].swapaxes(0, 1)[:, :, None]
