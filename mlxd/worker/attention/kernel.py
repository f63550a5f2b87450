"""Attention of a step by our own kernels: every row reads the pool where it lies.

It does not know the model or how steps are compiled. Decode rows go through one kernel, which also writes
their keys and values. The tokens of chunks (chunks.py) are placed first: keys and values in the pool, queries
side by side. At the end everything is collected in the order of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlxd.worker.attention.chunks import (
    FlatRows,
    GivenCall,
    LongChunks,
    ProjectedCall,
    chunk_parts,
    table_rows,
)
from mlxd.worker.batch import StepBatch
from mlxd.worker.fusing import FusedAttention, Rotary
from mlxd.worker.kernels.paged import PagedKernels, Projected, Rows
from mlxd.worker.kernels.tile import AttentionShape
from mlxd.worker.kv_pool import LayerCache


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step's rows on the device, shared by all layers. Arrays are int32."""

    positions: mx.array
    """[N]"""
    decode: Rows | None
    num_decode_rows: int
    slot_mapping: mx.array | None = None
    """[N - D]: places of the tokens that are not decode rows'"""
    chunks: tuple[FlatRows | LongChunks, ...] = ()
    collected: mx.array | None = None
    """[N, 4], as PagedKernels.collect wants it; the sources: decode rows, if there are any, and `chunks`"""
    rotations: dict[tuple[object, ...], mx.array] = field(default_factory=dict)
    """tables of the rotary embeddings met so far"""

    def rotation(self, rotary: Rotary) -> mx.array:
        """Made once a step, for all layers that rotate alike."""
        if rotary.key not in self.rotations:
            self.rotations[rotary.key] = rotary.table(self.positions)
        return self.rotations[rotary.key]


@dataclass(slots=True)
class Order:
    """What MLX must compute before kernels that look at what it does not see written: [1, 1, 1, 1] arrays.

    `before`: what the step before wrote, in any layer. `done`: as much of this step as its newest attention
    output follows from; after the last layer, for the next step to begin with.
    """

    before: mx.array
    done: mx.array

    @classmethod
    def begin(cls, after: mx.array) -> Order:
        return cls(after, after)


class KernelLayer:
    """A layer's cache as mlx-lm's attention layers see it. `begin` comes before each forward."""

    def __init__(self, cache: LayerCache, kernels: PagedKernels, fused: FusedAttention | None = None) -> None:
        self.cache = cache
        self._kernels = kernels
        self._fused = fused
        self._shapes: dict[tuple[int, float, float, bool], AttentionShape] = {}
        self.offset = cache.offset

    def begin(self, step: StepRows, order: Order) -> None:
        """`order` is that of the step, shared by all layers."""
        self._step = step
        self._order = order
        self.offset = step.positions

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The same: the attention kernel writes them."""
        return keys, values

    def make_mask(self, length: int, **_: object) -> None:
        """mlx-lm asks for a mask; ours is part of the kernels."""

    def shape(self, num_heads: int, scale: float, softcap: float | None, sinks: bool) -> AttentionShape:
        key = (num_heads, scale, softcap or 0.0, sinks)
        if key not in self._shapes:
            _, num_kv_heads, block_size, key_dim = self.cache.keys.shape
            self._shapes[key] = AttentionShape(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                key_dim=key_dim,
                value_dim=self.cache.values.shape[-1],
                block_size=block_size,
                dtype=str(self.cache.keys.dtype).removeprefix("mlx.core."),
                scale=scale,
                softcap=softcap or 0.0,
                sinks=sinks,
            )
        return self._shapes[key]

    def copy_blocks(self, pairs: mx.array, after: mx.array) -> mx.array:
        """int32 [P, 2]; returns what comes after it."""
        num_kv_heads = self.cache.keys.shape[1]
        shape = self.shape(num_kv_heads, 1.0, None, False)
        return self._kernels.copy(shape, pairs, self.cache.keys, self.cache.values, after=after)

    def write(self, keys: mx.array, values: mx.array, places: mx.array, after: mx.array) -> mx.array:
        """[N, num_kv_heads, 1, dim] each, to int32 [N] places; returns what comes after it."""
        shape = self.shape(keys.shape[1], 1.0, None, False)
        return self._kernels.write(
            shape, keys, values, places, self.cache.keys, self.cache.values, after=after
        )

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
        """queries [N, num_heads, 1, key_dim] and this step's keys and values -> [N, num_heads, 1, value_dim]

        support.py has seen that the model passes no mask or sinks.
        """
        step, order, pools = self._step, self._order, (self.cache.keys, self.cache.values)
        dtype = self.cache.keys.dtype
        shape = self.shape(queries.shape[1], scale, softcap, sinks is not None)
        fused, kernels = self._fused, self._kernels
        call: ProjectedCall | GivenCall
        outputs = []
        if fused is not None and fused.tap.open and kernels.can_fuse(shape, fused.fusion):
            projected = Projected(
                fused.project(fused.tap.take()).astype(dtype),
                step.rotation(fused.rotary),
                fused.fusion,
                fused.weights,
            )
            if step.decode is not None:
                outputs.append(
                    kernels.attend_projected(
                        shape, step.decode, projected, *pools, sinks=sinks, after=order.before
                    )
                )
            call = ProjectedCall(kernels, shape, *pools, projected, order.before)
        else:
            given, keys, values = queries.astype(dtype), keys.astype(dtype), values.astype(dtype)
            split = step.num_decode_rows
            if step.decode is not None:
                own = (keys[:split], values[:split]) if step.chunks else (keys, values)
                outputs.append(
                    kernels.attend(
                        shape,
                        step.decode,
                        given[:split] if step.chunks else given,
                        *pools,
                        keys=own[0],
                        values=own[1],
                        sinks=sinks,
                        after=order.before,
                    )
                )
            written = order.before
            if step.slot_mapping is not None:
                written = kernels.write(
                    shape, keys[split:], values[split:], step.slot_mapping, *pools, after=written
                )
            call = GivenCall(kernels, shape, *pools, given, written)
        outputs += [chunk.attend(call) for chunk in step.chunks]
        output = outputs[0] if step.collected is None else kernels.collect(shape, outputs, step.collected)
        order.done = output[:1, :1, :1, :1]
        return output.astype(queries.dtype)


def step_rows(batch: StepBatch, block_size: int, *, pad: bool, dtype: mx.Dtype) -> StepRows:
    """The rows of a step of any kind. `pad`: long chunks are padded to lengths that come often."""
    split = batch.num_decode_rows
    decode = None
    if split:
        decode = table_rows(batch, np.arange(split), batch.context_lens[:split], block_size)
    if not batch.chunks:
        return StepRows(mx.array(batch.positions), decode, split)
    parts = chunk_parts(batch, block_size, pad=pad, dtype=dtype)
    collected = np.empty((len(batch.positions), 4), dtype=np.int32)
    collected[:split] = 0, 0, 0, 1
    collected[:split, 1] = np.arange(split)
    for number, part in enumerate(parts, 1 if split else 0):
        collected[part.tokens, 0], collected[part.tokens, 1:] = number, part.collected()
    return StepRows(
        mx.array(batch.positions),
        decode,
        split,
        mx.array(batch.slot_mapping[split:]),
        tuple(parts),
        mx.array(collected),
    )
