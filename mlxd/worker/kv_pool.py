"""The paged KV cache: one pool of blocks a layer, and the cache object that a layer of mlx-lm sees.

It does not know requests: blocks are numbers that the front hands out.

A pool is [num_blocks, num_kv_heads, block_size, head_dim]. Heads come before the tokens of a block so that
one (block, head) is a matrix that a matrix product takes as it lies: on a CPU, gathering 32 sequences of 512
tokens took 29 ms a layer with tokens first and 15 ms with heads first, and attention without any gathering
(attention/blockwise.py) is possible at all.

MLX's scatter writes in place while nothing else refers to the pool, so pools are never handed out, kept or
evaluated as outputs: with that peak memory rose by 40 % and a step's time by 30 %.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxd.worker.attention import StepAttention
from mlxd.worker.support import LayerShape

MAX_SLICES = 4
"""runs of blocks that are written one by one; more go by a scatter"""


class KvPool:
    """Keys and values of all layers. `nbytes` is what it takes, `block_bytes` what a block does."""

    def __init__(
        self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, dtype: mx.Dtype
    ) -> None:
        self.shapes = tuple(shapes)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.layers = [
            (LatentCache if shape.latent else LayerCache)(shape, num_blocks, block_size, dtype)
            for shape in shapes
        ]
        arrays = self._arrays()
        mx.eval(arrays)
        self.nbytes = sum(array.nbytes for array in arrays)
        self.block_bytes = self.nbytes // num_blocks

    def clear(self) -> None:
        """Empty all blocks. What was written and could not be computed is forgotten too."""
        for layer in self.layers:
            layer.clear()
            mx.eval(layer.arrays)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination), in every layer.

        They are read, and that waited for, before any is written: MLX copies the whole pool for a write while
        a reader of it has not run (1 GB for each request with a hit, 155 ms on two cores).
        """
        source, destination = (mx.array(ids, dtype=mx.int32) for ids in zip(*pairs, strict=True))
        arrays = self._arrays()
        read = [array[source] for array in arrays]
        mx.eval(read)
        for array, blocks in zip(arrays, read, strict=True):
            array[destination] = blocks

    def read_blocks(self, ids: mx.array) -> mx.array:
        """int32 [n] to uint8 [n, block_bytes]: of each block all keys and values, a layer after another."""
        arrays = self._arrays()
        return mx.concatenate([array[ids].reshape(len(ids), -1) for array in arrays], axis=1).view(mx.uint8)

    def split_blocks(self, payload: mx.array) -> list[tuple[mx.array, ...]]:
        """The reverse, to each layer's `arrays`, [n, num_kv_heads, block_size, dim]."""
        flat = payload.view(self.layers[0].keys.dtype)
        shapes = [array.shape[1:] for array in self._arrays()]
        ends = list(itertools.accumulate(map(prod, shapes)))
        parts = iter(mx.split(flat, ends[:-1], axis=1))
        return [
            tuple(next(parts).reshape(-1, *array.shape[1:]) for array in layer.arrays)
            for layer in self.layers
        ]

    def write_blocks(self, block_ids: Sequence[int], payload: mx.array) -> None:
        """Overwrite blocks in every layer with uint8 [n, block_bytes].

        Where they lie in a few runs, as those of a pool not yet worn mostly do, by slices: on two CPU cores,
        22 blocks of SmolLM2 in one run take 8 ms so, and by MLX's scatter 23 ms or more.
        """
        runs = consecutive_runs(block_ids)
        ids = mx.array(list(block_ids), dtype=mx.int32)
        split = itertools.chain.from_iterable(self.split_blocks(payload))
        for array, blocks in zip(self._arrays(), split, strict=True):
            if len(runs) > MAX_SLICES:
                array[ids] = blocks
                continue
            for first, run in runs:
                array[run.start : run.stop] = blocks[first : first + len(run)]

    def begin_step(
        self,
        attention: StepAttention,
        positions: npt.NDArray[np.int32],
        slot_mapping: npt.NDArray[np.int32],
    ) -> list[LayerCache]:
        """Point every layer at a step's N tokens: int32 [N] positions and [N] places in the pool."""
        offset = mx.array(positions)
        blocks, places = np.divmod(slot_mapping, np.int32(self.block_size))
        begun = blocks[places == 0]
        new_blocks = mx.array(begun) if len(begun) else None
        columns = mx.array(blocks)[:, None], mx.array(places)[:, None]
        for layer in self.layers:
            layer.begin_step(attention, offset, new_blocks, *columns)
        return self.layers

    def end_step(self) -> None:
        """The step's graph is built: let go of its keys and values, which would else live in all layers while
        it runs, and until the next."""
        for layer in self.layers:
            layer.end_step()

    def _arrays(self) -> list[mx.array]:
        """A layer after another. Assignments to their elements are assignments to the pool's."""
        return [array for layer in self.layers for array in layer.arrays]


def consecutive_runs(block_ids: Sequence[int]) -> list[tuple[int, range]]:
    """Blocks in runs of consecutive ids: where in `block_ids` each begins, and the ids."""
    starts = [i for i, block_id in enumerate(block_ids) if i == 0 or block_ids[i - 1] + 1 != block_id]
    return [
        (start, range(block_ids[start], block_ids[start] + stop - start))
        for start, stop in zip(starts, [*starts[1:], len(block_ids)], strict=True)
    ]


class LayerCache:
    """One layer's pool, with the part of mlx-lm's cache interface that its attention layers use.

    `offset` is an int32 array [N]: the position of each row's token, which is what rope wants.
    """

    def __init__(self, shape: LayerShape, num_blocks: int, block_size: int, dtype: mx.Dtype) -> None:
        prefix = (num_blocks, shape.num_kv_heads, block_size)
        self.keys = mx.zeros((*prefix, shape.key_dim), dtype=dtype)
        self.values = mx.zeros((*prefix, shape.value_dim), dtype=dtype)
        self.window = shape.window
        self.offset = mx.zeros((0,), dtype=mx.int32)
        self._heads = mx.arange(shape.num_kv_heads, dtype=mx.int32)[None]
        self._blocks = self._places = self.offset
        self._new_blocks: mx.array | None = None
        self._attention: StepAttention | None = None
        self._given: tuple[mx.array, mx.array] | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All that the layer keeps, [num_blocks, …] each."""
        return self.keys, self.values

    def clear(self) -> None:
        self.keys, self.values = mx.zeros_like(self.keys), mx.zeros_like(self.values)

    def begin_step(
        self,
        attention: StepAttention,
        offset: mx.array,
        new_blocks: mx.array | None,
        blocks: mx.array,
        places: mx.array,
    ) -> None:
        """int32: positions [N], blocks that get their first token, where each token goes ([N, 1] twice)."""
        self._attention = attention
        self._given = None
        self.offset = offset
        self._new_blocks = new_blocks
        self._blocks = blocks
        self._places = places

    def end_step(self) -> None:
        self._attention = self._given = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [N, num_kv_heads, 1, head_dim] keys and values to the pool, and give them back as they came.

        A block is emptied when its first token comes: positions past a row's end get the weight 0, and 0
        times NaN is NaN, so a failed request would otherwise live on in whoever gets its blocks next.
        """
        self._write(keys, values)
        self._given = keys, values
        return keys, values

    def _write(self, *tokens: mx.array) -> None:
        """[N, num_kv_heads, 1, dim] for each array."""
        place = (self._blocks, self._heads, self._places)
        for array, new in zip(self.arrays, tokens, strict=True):
            if self._new_blocks is not None:
                array[self._new_blocks] = 0
            array[place] = new.squeeze(2).astype(array.dtype)

    def keys_and_values(self) -> tuple[mx.array, mx.array] | None:
        """What the step's `update_and_fetch` gave, for layers that attend over another one's."""
        return self._given

    def make_mask(self, length: int, **_: object) -> None:
        """mlx-lm asks for a mask; ours is part of the step's attention."""

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
        """Attention of queries [N, num_heads, 1, key_dim] over each row's own sequence in the pool.

        Returns [N, num_heads, 1, value_dim]. `keys` and `values` are this step's, which the pool has
        too; support.py has seen that the model's masks say what `window` does.
        """
        assert self._attention is not None
        return self._attention(
            queries,
            self.keys,
            self.values,
            scale=scale,
            softcap=softcap,
            window=self.window,
            sinks=sinks,
        )


class LatentCache(LayerCache):
    """A layer with latent attention (MLA): of each token one key, its latent and its positional part side by
    side. The value is the latent again, so it is not kept twice.

    mlx-lm's layers fetch a sequence's latents and positional parts, and give their attention the products of
    the query with the latter as a mask. What they fetch here is an identity matrix: the mask then is the
    positional part of the query, scaled.
    """

    def __init__(self, shape: LayerShape, num_blocks: int, block_size: int, dtype: mx.Dtype) -> None:
        super().__init__(replace(shape, value_dim=0), num_blocks, block_size, dtype)
        self._latent_dim = shape.value_dim
        self._identity = mx.eye(shape.key_dim - shape.value_dim, dtype=dtype)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.keys,)

    def clear(self) -> None:
        self.keys = mx.zeros_like(self.keys)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write latents [N, 1, 1, latent_dim] and positional parts [N, 1, 1, rope_dim]."""
        self._write(mx.concatenate([keys, values], axis=-1))
        return keys, self._identity.astype(values.dtype)

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
        """Queries [N, num_heads, 1, latent_dim] -> as many outputs; `mask` is their positional parts, scaled,
        [N, num_heads, 1, rope_dim].

        Values are read as whole keys and cut at the end: on a CPU, products with a part of each key take
        eight times as long (16 rows of 1,024 tokens, 512 + 64 wide).
        """
        assert self._attention is not None and isinstance(mask, mx.array)
        output = self._attention(
            mx.concatenate([queries * scale, mask], axis=-1),
            self.keys,
            self.keys,
            scale=1.0,
            softcap=softcap,
            window=self.window,
            sinks=sinks,
        )
        return output[..., : self._latent_dim]
