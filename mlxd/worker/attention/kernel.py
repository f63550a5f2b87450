"""Attention of a step by our own kernels: every row reads the pool where it lies.

It does not know the model or how steps are compiled. Decode rows go through one kernel, which also writes
their keys and values; the tokens of other rows are written first. Then short chunks run as rows of one query
each through the same kernel, long ones through MLX's attention, over their own keys or over a gathered copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxd.step import NULL_BLOCK
from mlxd.worker.attention.gather import MAX_SCORES, attend
from mlxd.worker.batch import Chunk, StepBatch
from mlxd.worker.fusing import FusedAttention, Rotary
from mlxd.worker.kernels.paged import PagedKernels, Projected, Rows
from mlxd.worker.kernels.tile import AttentionShape
from mlxd.worker.kv_pool import LayerCache

MAX_FLAT_TOKENS = 16
"""Chunks up to this long run as rows of one query each."""
QUERY_STEP = 64
KEY_STEP = 256
"""Long chunks and their sequences are padded to few sizes, multiples of these, on CUDA, where cuDNN
spends some 40 ms on a plan for each new set of sizes."""
FLAT = (0, 0)
MAX_FUSED_DIM = 128
"""of MLX's fused attention; beyond it, scores are written to memory"""


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
    restore: mx.array | None = None
    """puts the chunks' results, in the order of `chunks`, into that of the step; None: they are"""
    rotations: dict[tuple[object, ...], mx.array] | None = None
    """tables of the rotary embeddings met so far; None: layers get queries, keys and values from the model"""

    def rotation(self, rotary: Rotary) -> mx.array:
        """Made once a step, for all layers that rotate alike."""
        assert self.rotations is not None
        if rotary.key not in self.rotations:
            self.rotations[rotary.key] = rotary.table(self.positions)
        return self.rotations[rotary.key]


@dataclass(slots=True)
class Order:
    """What MLX must compute before kernels that look at what it does not see written: [1, 1, 1, 1] arrays.

    `before`: what the step before wrote, in any layer. `written`: also what this step's chunks have written
    so far. `done`: as much of this step as its newest attention output follows from.
    """

    before: mx.array
    written: mx.array
    done: mx.array

    @classmethod
    def begin(cls, after: mx.array) -> Order:
        return cls(after, after, after)

    def end(self) -> mx.array:
        """For the next step to begin with."""
        return self.done if self.written is self.before else self.done + self.written


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
        keys, values = keys.astype(dtype), values.astype(dtype)
        shape = self.shape(queries.shape[1], scale, softcap, sinks is not None)
        fused = self._fused
        if fused is not None and step.rotations is not None and self._kernels.can_fuse(shape, fused.fusion):
            assert step.decode is not None
            output = self._kernels.attend_projected(
                shape,
                step.decode,
                Projected(
                    fused.project(fused.tap.take()).astype(dtype),
                    step.rotation(fused.rotary),
                    fused.fusion,
                    fused.weights,
                ),
                *pools,
                sinks=sinks,
                after=order.before,
            )
            order.done = output[:1, :1, :1, :1]
            return output.astype(queries.dtype)
        outputs = []
        split = step.num_decode_rows
        if step.decode is not None:
            everything = not step.chunks
            outputs.append(
                self._kernels.attend(
                    shape,
                    step.decode,
                    (queries if everything else queries[:split]).astype(dtype),
                    *pools,
                    keys=keys if everything else keys[:split],
                    values=values if everything else values[:split],
                    sinks=sinks,
                    after=order.before,
                )
            )
        if step.slot_mapping is not None:
            order.written = self._kernels.write(
                shape, keys[split:], values[split:], step.slot_mapping, *pools, after=order.written
            )
            call = LayerCall(self._kernels, shape, queries.astype(dtype), keys, values, *pools, order.written)
            results = [chunk.attend(call) for chunk in step.chunks]
            chunks = results[0] if len(results) == 1 else mx.concatenate(results)
            outputs.append(chunks if step.restore is None else chunks[step.restore])
        output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        order.done = output[:1, :1, :1, :1]
        return output.astype(queries.dtype)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer's attention call, for the parts of a step. After `written` the pools have its tokens."""

    kernels: PagedKernels
    shape: AttentionShape
    queries: mx.array
    """[N, num_heads, 1, key_dim]"""
    keys: mx.array
    """[N, num_kv_heads, 1, dim]"""
    values: mx.array
    key_pool: mx.array
    value_pool: mx.array
    written: mx.array


@dataclass(frozen=True, slots=True)
class FlatRows:
    """Tokens start … stop - 1 of the step, each a row of one query."""

    start: int
    stop: int
    rows: Rows

    def attend(self, call: LayerCall) -> mx.array:
        return call.kernels.attend(
            call.shape,
            self.rows,
            call.queries[self.start : self.stop],
            call.key_pool,
            call.value_pool,
            after=call.written,
        )


def common_size(size: int, step: int) -> int:
    """The next of few sizes, all multiples of `step`: four between a size and its double."""
    steps = -(-size // step)
    grain = max(1, 1 << max(0, (steps - 1).bit_length() - 3))
    return -(-steps // grain) * grain * step


class LongChunks:
    """Chunks of several rows through MLX's attention, in one call, over keys gathered from the pool.

    Each is padded to the longest of them. Fresh ones are a whole sequence so far, and need no mask.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        block_tables: npt.NDArray[np.int32],
        block_size: int,
        *,
        pad: bool,
        dtype: mx.Dtype,
    ) -> None:
        count = len(chunks)
        lengths = np.array([chunk.length for chunk in chunks], dtype=np.int32)
        contexts = np.array([chunk.context_len for chunk in chunks], dtype=np.int32)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        self._padded, self._size = int(lengths.max()), int(contexts.max())
        self._fresh = bool((lengths == contexts).all())
        self._num_chunks = count
        if pad:
            self._padded = common_size(self._padded, QUERY_STEP)
            self._size = self._padded if self._fresh else common_size(self._size, KEY_STEP)
            self._size = max(self._size, self._padded)
            self._num_chunks = 1 << (count - 1).bit_length()
        places = np.arange(self._padded, dtype=np.int32)
        # Whatever lies behind a chunk's end, or fills up their number, is read and its result left out.
        queries = np.zeros((self._num_chunks, self._padded), dtype=np.int32)
        queries[:count] = starts[:, None] + np.minimum(places, lengths[:, None] - 1)
        self._queries = mx.array(queries.reshape(-1))
        inside = (places < lengths[:, None]).reshape(-1)
        whole = count == self._num_chunks and inside.all()
        self._results = None if whole else mx.array(np.flatnonzero(inside).astype(np.int32))
        width = -(-self._size // block_size)
        tables = np.full((self._num_chunks, width), NULL_BLOCK, dtype=np.int32)
        sizes = np.zeros(self._num_chunks + 2, dtype=np.int32)
        sizes[:count], sizes[-2:] = contexts, (self._size, width)
        for table, chunk in zip(tables, chunks, strict=False):
            used = -(-chunk.context_len // block_size)
            table[:used] = block_tables[chunk.row, :used]
        self._tables, self._lengths = mx.array(tables), mx.array(sizes)
        self._mask: mx.array | str = "causal"
        if self._fresh:
            return
        first = np.zeros((self._num_chunks, 1), dtype=np.int32)
        first[:count, 0] = contexts - lengths
        self._seen = (mx.arange(self._size) <= mx.array(first + places)[..., None])[:, None]
        # What is added to scores, as cuDNN wants it: once a step, not once a layer.
        self._mask = mx.where(self._seen, 0, mx.finfo(dtype).min).astype(dtype)

    def attend(self, call: LayerCall) -> mx.array:
        """[all the chunks' tokens, num_heads, 1, value_dim]"""
        queries = call.kernels.take(call.queries, self._queries)
        queries = queries.reshape(self._num_chunks, self._padded, *queries.shape[1::2]).swapaxes(1, 2)
        keys, values = call.kernels.gather(
            call.shape,
            self._tables,
            self._lengths,
            self._size,
            call.key_pool,
            call.value_pool,
            after=call.written,
        )
        output = self._attend(call.shape, queries, keys, values).swapaxes(1, 2)
        output = output.reshape(-1, output.shape[2], 1, output.shape[3])
        return output if self._results is None else call.kernels.take(output, self._results)

    def _attend(self, shape: AttentionShape, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """All queries at once where no scores are written, else in tiles of queries that bound them."""
        softcap = shape.softcap or None
        fused = softcap is None and max(shape.key_dim, shape.value_dim) <= MAX_FUSED_DIM
        scores = self._num_chunks * shape.num_heads * self._size
        tile = self._padded if fused else max(1, MAX_SCORES // scores)
        whole = self._mask
        if softcap is not None and isinstance(whole, mx.array):
            whole = self._seen
        if tile >= self._padded:
            return attend(queries, keys, values, scale=shape.scale, mask=whole, softcap=softcap)
        outputs = []
        for first in range(0, self._padded, tile):
            last = min(first + tile, self._padded)
            mask, size = whole, self._size
            if isinstance(mask, mx.array):
                mask = mask[:, :, first:last]
            else:
                size -= self._padded - last
            outputs.append(
                attend(
                    queries[:, :, first:last],
                    keys[:, :, :size],
                    values[:, :, :size],
                    scale=shape.scale,
                    mask=mask,
                    softcap=softcap,
                )
            )
        return mx.concatenate(outputs, axis=2)


def step_rows(batch: StepBatch, block_size: int, *, pad: bool, dtype: mx.Dtype) -> StepRows:
    """The rows of a step of any kind. `pad`: long chunks are padded to lengths that come often."""
    split = batch.num_decode_rows
    decode = None
    if split:
        decode = _rows(batch, np.arange(split), batch.context_lens[:split], block_size)
    if not batch.chunks:
        return StepRows(mx.array(batch.positions), decode, split)
    parts: list[FlatRows | LongChunks] = []
    ordered = sorted(batch.chunks, key=_kind)
    for kind, group in itertools.groupby(ordered, key=_kind):
        chunks = list(group)
        if kind == FLAT:
            parts += [_flat_rows(batch, run, block_size) for run in _runs(chunks)]
        else:
            parts.append(LongChunks(chunks, batch.block_tables, block_size, pad=pad, dtype=dtype))
    restore = None
    if len(parts) > 1:
        tokens = np.concatenate([np.arange(c.start, c.start + c.length) for c in ordered])
        restore = mx.array(np.argsort(tokens).astype(np.int32))
    return StepRows(
        mx.array(batch.positions), decode, split, mx.array(batch.slot_mapping[split:]), tuple(parts), restore
    )


def _kind(chunk: Chunk) -> tuple[int, int]:
    """Chunks of one kind go together: FLAT ones, fresh ones by size, others by that of their context."""
    if chunk.length <= MAX_FLAT_TOKENS:
        return FLAT
    return (1 if chunk.length == chunk.context_len else 2), (chunk.context_len - 1).bit_length()


def _runs(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks whose tokens lie one behind the other, together."""
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        if runs and runs[-1][-1].start + runs[-1][-1].length == chunk.start:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs


def _flat_rows(batch: StepBatch, chunks: Sequence[Chunk], block_size: int) -> FlatRows:
    start, stop = chunks[0].start, chunks[-1].start + chunks[-1].length
    table_rows = np.repeat([chunk.row for chunk in chunks], [chunk.length for chunk in chunks])
    return FlatRows(start, stop, _rows(batch, table_rows, batch.positions[start:stop] + 1, block_size))


def _rows(
    batch: StepBatch,
    table_rows: npt.NDArray[np.intp],
    context_lens: npt.NDArray[np.int32],
    block_size: int,
) -> Rows:
    """Rows of these contexts, over the tables of the batch's rows `table_rows`, ascending."""
    first, last = int(table_rows[0]), int(table_rows[-1])
    width = batch.block_tables.shape[1]
    return Rows(
        mx.array(context_lens),
        mx.array(((table_rows - first) * width).astype(np.int32)),
        mx.array(batch.block_tables[first : last + 1].reshape(-1)),
        int(context_lens.max()),
    )
