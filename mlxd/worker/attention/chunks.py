"""The chunks of a step: what of them is placed where, and how their queries attend.

It does not know layers or order. Short chunks run as rows of one query each through the decode kernel, long
ones through MLX's attention, over their own keys or over a gathered copy.
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
from mlxd.worker.kernels.paged import PagedKernels, Placed, Places, Projected, Rows
from mlxd.worker.kernels.tile import AttentionShape

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
class ProjectedCall:
    """One layer's attention call, for the chunks of a step. The kernels do all that follows projection."""

    kernels: PagedKernels
    shape: AttentionShape
    key_pool: mx.array
    value_pool: mx.array
    projected: Projected
    before: mx.array
    """what must be computed before anything is written"""

    def place(self, places: Places, *, own: bool) -> Placed:
        return self.kernels.place(
            self.shape,
            self.projected,
            places,
            self.key_pool,
            self.value_pool,
            own=own,
            after=self.before,
        )


@dataclass(frozen=True, slots=True)
class GivenCall:
    """The same, where the model has made queries, keys and values. After `written` the pools have them."""

    kernels: PagedKernels
    shape: AttentionShape
    key_pool: mx.array
    value_pool: mx.array
    queries: mx.array
    """[N, num_heads, 1, key_dim]"""
    written: mx.array

    def place(self, places: Places, *, own: bool) -> Placed:
        """Keys and values are never given beside the queries."""
        taken = self.kernels.take(self.queries, places.tokens)
        taken = taken.reshape(places.num_sequences, places.length, *taken.shape[1::2]).swapaxes(1, 2)
        return Placed(taken, self.written, None, None)


@dataclass(frozen=True, slots=True)
class FlatRows:
    """Tokens of short chunks, each a row of one query."""

    tokens: npt.NDArray[np.int32]
    places: Places
    rows: Rows

    def attend(self, call: ProjectedCall | GivenCall) -> mx.array:
        """[all tokens, num_heads, 1, value_dim]"""
        placed = call.place(self.places, own=False)
        return call.kernels.attend(
            call.shape, self.rows, placed.queries, call.key_pool, call.value_pool, after=placed.written
        )

    def collected(self) -> npt.NDArray[np.int32]:
        """[all tokens, 3]: sequence, place and L of each, in the order of `tokens`."""
        count = len(self.tokens)
        return np.stack([np.arange(count), np.zeros(count), np.ones(count)], axis=1).astype(np.int32)


def common_size(size: int, step: int) -> int:
    """The next of few sizes, all multiples of `step`: four between a size and its double."""
    steps = -(-size // step)
    grain = max(1, 1 << max(0, (steps - 1).bit_length() - 3))
    return -(-steps // grain) * grain * step


class LongChunks:
    """Chunks of several rows through MLX's attention, in one call, over keys gathered from the pool.

    Each is padded to the longest of them. Fresh ones are a whole sequence so far: they need no mask, and no
    gathering where keys and values come beside the queries.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        batch: StepBatch,
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
        # What lies behind a chunk's end, or fills up their number, repeats a token; its result is not read.
        tokens = np.repeat(starts[:1, None], self._num_chunks, axis=0) + np.zeros_like(places)
        tokens[:count] = starts[:, None] + np.minimum(places, lengths[:, None] - 1)
        self._places = _places(batch, tokens)
        inside = places < lengths[:, None]
        self.tokens = tokens[:count][inside]
        self._inside = inside
        width = -(-self._size // block_size)
        tables = np.full((self._num_chunks, width), NULL_BLOCK, dtype=np.int32)
        sizes = np.zeros(self._num_chunks + 2, dtype=np.int32)
        sizes[:count], sizes[-2:] = contexts, (self._size, width)
        for table, chunk in zip(tables, chunks, strict=False):
            used = -(-chunk.context_len // block_size)
            table[:used] = batch.block_tables[chunk.row, :used]
        self._tables, self._lengths = mx.array(tables), mx.array(sizes)
        self._mask: mx.array | str = "causal"
        if self._fresh:
            return
        first = np.zeros((self._num_chunks, 1), dtype=np.int32)
        first[:count, 0] = contexts - lengths
        self._seen = (mx.arange(self._size) <= mx.array(first + places)[..., None])[:, None]
        # What is added to scores, as cuDNN wants it: once a step, not once a layer.
        self._mask = mx.where(self._seen, 0, mx.finfo(dtype).min).astype(dtype)

    def attend(self, call: ProjectedCall | GivenCall) -> mx.array:
        """[chunks, num_heads, padded length, value_dim]"""
        placed = call.place(self._places, own=self._fresh)
        keys, values = placed.keys, placed.values
        if keys is None or values is None:
            keys, values = call.kernels.gather(
                call.shape,
                self._tables,
                self._lengths,
                self._size,
                call.key_pool,
                call.value_pool,
                after=placed.written,
            )
        return self._attend(call.shape, placed.queries, keys, values)

    def collected(self) -> npt.NDArray[np.int32]:
        """[all tokens, 3]: sequence, place and L of each, in the order of `tokens`."""
        sequences, places = np.nonzero(self._inside)
        lengths = np.full(len(places), self._padded)
        return np.stack([sequences, places, lengths], axis=1).astype(np.int32)

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


def chunk_parts(
    batch: StepBatch, block_size: int, *, pad: bool, dtype: mx.Dtype
) -> list[FlatRows | LongChunks]:
    """All chunks of a step, those of a kind together. `pad`: long ones to lengths that come often."""
    parts: list[FlatRows | LongChunks] = []
    for kind, group in itertools.groupby(sorted(batch.chunks, key=_kind), key=_kind):
        chunks = list(group)
        if kind == FLAT:
            parts.append(_flat_rows(batch, chunks, block_size))
        else:
            parts.append(LongChunks(chunks, batch, block_size, pad=pad, dtype=dtype))
    return parts


def _kind(chunk: Chunk) -> tuple[int, int]:
    """Chunks of one kind go together: FLAT ones, fresh ones by size, others by that of their context."""
    if chunk.length <= MAX_FLAT_TOKENS:
        return FLAT
    return (1 if chunk.length == chunk.context_len else 2), (chunk.context_len - 1).bit_length()


def _flat_rows(batch: StepBatch, chunks: Sequence[Chunk], block_size: int) -> FlatRows:
    tokens = np.concatenate([np.arange(c.start, c.start + c.length, dtype=np.int32) for c in chunks])
    numbers = np.repeat([chunk.row for chunk in chunks], [chunk.length for chunk in chunks])
    rows = table_rows(batch, numbers, batch.positions[tokens] + 1, block_size)
    return FlatRows(tokens, _places(batch, tokens[:, None]), rows)


def _places(batch: StepBatch, tokens: npt.NDArray[np.int32]) -> Places:
    """int32 tokens [n, L] of the step."""
    count, length = tokens.shape
    flat = tokens.reshape(-1)
    slots = np.append(batch.slot_mapping[flat], np.int32(length))
    return Places(count, length, mx.array(flat), mx.array(slots))


def table_rows(
    batch: StepBatch,
    numbers: npt.NDArray[np.intp],
    context_lens: npt.NDArray[np.int32],
    block_size: int,
) -> Rows:
    """Rows of these contexts, over the tables of the batch's rows `numbers`, ascending."""
    first, last = int(numbers[0]), int(numbers[-1])
    width = batch.block_tables.shape[1]
    return Rows(
        mx.array(context_lens),
        mx.array(((numbers - first) * width).astype(np.int32)),
        mx.array(batch.block_tables[first : last + 1].reshape(-1)),
        int(context_lens.max()),
    )
