"""Attention of one step over the paged pool: decode rows and prefill chunks, put together in row order.

It does not know the model: queries and pools come layer by layer, and what depends on the step alone is
computed once, when the step begins.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxd.step import NULL_BLOCK
from mlxd.worker.attention.blockwise import BlockwiseDecode
from mlxd.worker.attention.gather import ChunkAttention, GatherDecode
from mlxd.worker.attention.grouping import group_by_width
from mlxd.worker.batch import StepBatch

__all__ = ["ATTENTIONS", "StepAttention"]

ATTENTIONS: dict[str, type[BlockwiseDecode] | type[GatherDecode]] = {
    "blockwise": BlockwiseDecode,
    "gather": GatherDecode,
}
"""How decode rows read the pool, by the name that WorkerReady carries."""


class StepAttention:
    """The attention of all rows of a step; called once a layer."""

    def __init__(self, batch: StepBatch, block_size: int, name: str) -> None:
        decode = ATTENTIONS[name]
        context_lens = batch.context_lens[: batch.num_decode_rows]
        widths = -(-context_lens // block_size)
        rows, self._decodes = [], []
        for group in group_by_width(widths):
            # A table may run ahead of its row; what those blocks hold is of no concern here.
            inside = np.arange(group.width) < widths[group.rows, None]
            tables = np.where(inside, batch.block_tables[group.rows, : group.width], NULL_BLOCK)
            self._decodes.append(decode(tables, context_lens[group.rows], block_size))
            rows.append(group.rows)
        order = [int(row) for group_rows in rows for row in group_rows]
        self._num_decode_rows = batch.num_decode_rows
        # Rows go through in group order and come back; one group needs neither.
        self._order = self._inverse = None
        if len(rows) > 1:
            inverse = sorted(range(len(order)), key=order.__getitem__)
            self._order = mx.array(order, dtype=mx.int32)
            self._inverse = mx.array(inverse, dtype=mx.int32)
        self._chunks = [
            ChunkAttention(
                batch.block_tables[chunk.row], chunk.start, chunk.length, chunk.context_len, block_size
            )
            for chunk in batch.chunks
        ]

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, softcap: float | None
    ) -> mx.array:
        """queries [N, num_heads, 1, key_dim], pools of one layer -> [N, num_heads, 1, value_dim]"""
        outputs = []
        if self._decodes:
            decode_queries = queries[: self._num_decode_rows]
            if self._order is not None:
                decode_queries = decode_queries[self._order]
            parts, start = [], 0
            for decode in self._decodes:
                rows = decode_queries[start : start + decode.num_rows]
                parts.append(decode(rows, keys, values, scale=scale, softcap=softcap))
                start += decode.num_rows
            output = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            outputs.append(output if self._inverse is None else output[self._inverse])
        outputs += [chunk(queries, keys, values, scale=scale, softcap=softcap) for chunk in self._chunks]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
