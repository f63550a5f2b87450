"""Where the tokens of a step with chunks go: one int32 array, and a shape of which there are few.

It does not know layers or kernels. Steps of one shape run the same graph, so everything is filled up to sizes
that come often: what is added computes what a token beside it does, or nothing, and is not looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxd.step import NULL_BLOCK
from mlxd.worker.attention.step_shape import LongShape, RowsShape, StepShape, TiledShape
from mlxd.worker.batch import Chunk, StepBatch, table_starts
from mlxd.worker.kernels.tile import TILE_QUERIES
from mlxd.worker.step_sizes import ROW_BUCKETS, ROW_STEP, TOKEN_STEP, at_least, common_size, power_of_two

Int32s = npt.NDArray[np.int32]

MIN_TABLE = 1024
ROW_TABLE = 64
"""Tables have room for so many blocks a decode row, MIN_TABLE at least, or four times as many, and so on."""
MAX_FLAT_TOKENS = 16
"""Chunks up to this long run as rows of one query each."""
QUERY_STEP = 64
KEY_STEP = 256
"""Long chunks and their sequences are padded to few sizes, multiples of these, on CUDA: the host takes longer
for a step of a new shape than the device for what is padded."""

ContextClass = Callable[[int, int], int]
"""(rows or tiles, longest context) -> one that stands for it (PagedKernels.context_class, tile_class)"""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """One step: its shape, and its numbers as `StepShape.unpack` finds them."""

    shape: StepShape
    packed: Int32s

    @classmethod
    def of(
        cls,
        batch: StepBatch,
        block_size: int,
        context_class: ContextClass,
        *,
        pad: bool,
        tile_class: ContextClass | None = None,
    ) -> StepLayout:
        """Of a step that has chunks.

        `pad`: rows, tokens and long chunks come in few sizes. `tile_class`: chunks attend tile by tile, in
        contexts that this makes few.
        """
        split, num_tokens = batch.num_decode_rows, len(batch.positions)
        num_rows = (power_of_two(split) if pad else at_least(split, ROW_BUCKETS, ROW_STEP)) if split else 0
        count = max(num_rows, common_size(num_tokens, TOKEN_STEP) if pad else num_tokens)
        flat_chunks, tiled_chunks, groups = _parts(batch.chunks, tiled=tile_class is not None)
        numbers = [*range(split), *(chunk.row for chunk in flat_chunks + tiled_chunks)]
        tables, starts = _joined_tables(batch, numbers, block_size, table_capacity(num_rows))
        collected = np.zeros((count, 4), dtype=np.int32)
        sources = itertools.count()
        arrays: list[Int32s] = []
        decode = flat = tiled = None
        if split:
            decode, more = _decode_arrays(batch, num_rows, starts, context_class)
            arrays += more
            _collect_rows(collected, np.arange(split, dtype=np.int32), next(sources))
        if flat_chunks:
            flat, more = _flat_arrays(flat_chunks, starts[split:], batch, context_class)
            arrays += more
            _collect_rows(collected, _joined_tokens(flat_chunks), next(sources))
        if tiled_chunks and tile_class is not None:
            tiled, more = _tiled_arrays(tiled_chunks, starts[split:], batch, tile_class, count)
            arrays += more
            _collect_rows(collected, _joined_tokens(tiled_chunks), next(sources))
        longs = []
        for chunks in groups:
            long, more = _long_arrays(chunks, batch, block_size, pad=pad)
            longs.append(long)
            arrays += more
            _collect_long(collected, chunks, long.length, next(sources))
        collected[num_tokens:] = collected[0]
        num_logits = len(batch.logit_tokens)
        if num_logits:
            num_logits = (
                power_of_two(max(num_logits, num_rows))
                if pad
                else at_least(num_logits, ROW_BUCKETS, ROW_STEP)
            )
        slots = np.full(count, -1, dtype=np.int32)
        slots[:split] = batch.slots[:split]
        head = [slots]
        head += [_filled(array, count) for array in (_given(batch), batch.positions, batch.slot_mapping)]
        head += [collected.reshape(-1), tables, _filled(batch.logit_tokens, num_logits)]
        return cls(
            StepShape(count, num_logits, len(tables), decode, flat, tiled, tuple(longs)),
            np.concatenate([*head, *arrays], dtype=np.int32),
        )


def _filled(array: Int32s, size: int) -> Int32s:
    """Zeros behind: token 0, position 0, a place in NULL_BLOCK."""
    return np.pad(array, (0, size - len(array)))


def _given(batch: StepBatch) -> Int32s:
    """Token ids of the whole step, 0 for decode rows."""
    return np.concatenate([np.zeros(batch.num_decode_rows, dtype=np.int32), batch.token_ids])


def _tokens(chunk: Chunk) -> Int32s:
    return np.arange(chunk.start, chunk.start + chunk.length, dtype=np.int32)


def _joined_tokens(chunks: Sequence[Chunk]) -> Int32s:
    return np.concatenate([_tokens(chunk) for chunk in chunks])


def _collect_rows(collected: Int32s, tokens: Int32s, source: int) -> None:
    """The attention of `tokens` is in `source`, one row after another."""
    collected[tokens] = source, 0, 0, 1
    collected[tokens, 1] = np.arange(len(tokens))


def _collect_long(collected: Int32s, chunks: Sequence[Chunk], length: int, source: int) -> None:
    """That of each chunk is in `source`, in a sequence of `length` places."""
    for sequence, chunk in enumerate(chunks):
        tokens = _tokens(chunk)
        collected[tokens] = source, sequence, 0, length
        collected[tokens, 2] = np.arange(chunk.length)


def table_capacity(num_rows: int) -> int:
    """Blocks that the tables of a step with so many decode rows have room for, unless they need more."""
    return max(MIN_TABLE, num_rows * ROW_TABLE)


def _joined_tables(
    batch: StepBatch, rows: Sequence[int], block_size: int, capacity: int
) -> tuple[Int32s, Int32s]:
    """The tables of these rows one after another, and where each begins."""
    wanted = np.fromiter(rows, dtype=np.intp, count=len(rows))
    given = table_starts(batch.context_lens, block_size)
    widths = np.diff(given)[wanted]
    starts = np.cumsum(widths) - widths
    places = np.repeat(given[wanted] - starts, widths)
    places += np.arange(len(places))
    while capacity < len(places):
        capacity *= 4
    tables = np.zeros(capacity, dtype=np.int32)
    tables[: len(places)] = batch.block_tables[places]
    return tables, starts.astype(np.int32)


def _parts(chunks: list[Chunk], *, tiled: bool) -> tuple[list[Chunk], list[Chunk], list[list[Chunk]]]:
    """Chunks that run as rows of one query each, those that run tile by tile (with `tiled` all of them),
    and groups of one kind and about one size, each of which attends in one call."""
    if tiled:
        return [], chunks, []
    flat = [chunk for chunk in chunks if chunk.length <= MAX_FLAT_TOKENS]
    longs = sorted((chunk for chunk in chunks if chunk.length > MAX_FLAT_TOKENS), key=_kind)
    return flat, [], [list(group) for _, group in itertools.groupby(longs, key=_kind)]


def _kind(chunk: Chunk) -> tuple[bool, int]:
    """Fresh ones by size, others by that of their context."""
    return chunk.length != chunk.context_len, (chunk.context_len - 1).bit_length()


def _long_shape(chunks: Sequence[Chunk], block_size: int, *, pad: bool) -> LongShape:
    count, length = len(chunks), max(chunk.length for chunk in chunks)
    size = max(chunk.context_len for chunk in chunks)
    fresh = all(chunk.length == chunk.context_len for chunk in chunks)
    if pad:
        count, length = power_of_two(count), common_size(length, QUERY_STEP)
        size = length if fresh else max(length, common_size(size, KEY_STEP))
    return LongShape(count, length, size, -(-size // block_size), fresh)


def _decode_arrays(
    batch: StepBatch, num_rows: int, starts: Int32s, context_class: ContextClass
) -> tuple[RowsShape, list[Int32s]]:
    """The shape, and flat arrays in the order of RowArrays. `starts`: where each row's table begins."""
    split = batch.num_decode_rows
    contexts = batch.context_lens[:split]
    shape = RowsShape(num_rows, context_class(num_rows, int(contexts.max())))
    return shape, [_filled(rows, num_rows) for rows in (contexts, starts[:split])]


def _flat_arrays(
    chunks: Sequence[Chunk], starts: Int32s, batch: StepBatch, context_class: ContextClass
) -> tuple[RowsShape, list[Int32s]]:
    """The shape, and flat arrays in the order of FlatArrays. `starts`: where each chunk's table begins."""
    tokens = _joined_tokens(chunks)
    contexts = batch.positions[tokens] + 1
    num_rows = power_of_two(len(tokens))
    shape = RowsShape(num_rows, context_class(num_rows, int(contexts.max())))
    own = np.repeat(starts, [chunk.length for chunk in chunks])
    filler = (0, num_rows - len(tokens))
    # The last token again, as often as needed.
    tokens, contexts, own = (np.pad(array, filler, mode="edge") for array in (tokens, contexts, own))
    return shape, [tokens, np.append(batch.slot_mapping[tokens], np.int32(1)), contexts, own]


def _tiled_arrays(
    chunks: Sequence[Chunk], starts: Int32s, batch: StepBatch, tile_class: ContextClass, num_tokens: int
) -> tuple[TiledShape, list[Int32s]]:
    """The shape, and flat arrays in the order of TiledArrays. `starts`: where each chunk's table begins.

    There is room for as many tokens as the step has, if most are theirs, so that their number makes no other
    shapes, and for tiles that are half empty.
    """
    tokens = _joined_tokens(chunks)
    size = num_tokens if 2 * len(tokens) > num_tokens else common_size(len(tokens), TOKEN_STEP)
    # The last token again, as often as needed.
    tokens = np.pad(tokens, (0, size - len(tokens)), mode="edge")
    slots = np.append(batch.slot_mapping[tokens], np.int32(1))
    tiles = []
    first = 0
    for chunk, start in zip(chunks, starts.tolist(), strict=True):
        position = chunk.context_len - chunk.length
        for offset in range(0, chunk.length, TILE_QUERIES):
            count = min(TILE_QUERIES, chunk.length - offset)
            tiles.append((first + offset, count, position + offset, start))
        first += chunk.length
    # Those with most keys begin first: the others even out the end.
    tiles.sort(key=lambda tile: -tile[2])
    num_tiles = power_of_two(max(len(tiles), 2 * -(-size // TILE_QUERIES)))
    longest = max(chunk.context_len for chunk in chunks)
    shape = TiledShape(len(tokens), num_tiles, tile_class(num_tiles, longest))
    padded = np.zeros((shape.num_tiles, 4), dtype=np.int32)
    padded[: len(tiles)] = tiles
    return shape, [tokens, slots, padded.reshape(-1)]


def _long_arrays(
    chunks: Sequence[Chunk], batch: StepBatch, block_size: int, *, pad: bool
) -> tuple[LongShape, list[Int32s]]:
    """The shape, and flat arrays in the order of LongArrays."""
    shape = _long_shape(chunks, block_size, pad=pad)
    count = len(chunks)
    lengths = np.array([chunk.length for chunk in chunks], dtype=np.int32)
    contexts = np.array([chunk.context_len for chunk in chunks], dtype=np.int32)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
    tokens = np.full((shape.num_chunks, shape.length), starts[0], dtype=np.int32)
    tokens[:count] = starts[:, None] + np.minimum(np.arange(shape.length), lengths[:, None] - 1)
    slots = np.append(batch.slot_mapping[tokens.reshape(-1)], np.int32(shape.length))
    tables = np.full((shape.num_chunks, shape.num_blocks), NULL_BLOCK, dtype=np.int32)
    given = table_starts(batch.context_lens, block_size)
    for table, chunk in zip(tables, chunks, strict=False):
        own = batch.block_tables[given[chunk.row] : given[chunk.row + 1]]
        table[: len(own)] = own
    sizes = np.zeros(shape.num_chunks + 2, dtype=np.int32)
    sizes[:count], sizes[-2:] = contexts, (shape.size, shape.num_blocks)
    first = _filled(contexts - lengths, shape.num_chunks)
    return shape, [tokens.reshape(-1), slots, tables.reshape(-1), sizes, first]
