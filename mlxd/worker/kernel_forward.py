"""Steps through the model with our own attention kernels, as compiled graphs.

It does not know sampling. A compiled graph belongs to one shape, so rows and tables come in few sizes: a step
is filled up with rows that write to NULL_BLOCK and whose results nobody reads.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from mlxd.step import NULL_BLOCK
from mlxd.worker.attention.kernel import KernelLayer, Order, StepRows
from mlxd.worker.attention.layout import MAX_FLAT_TOKENS, StepLayout, table_capacity
from mlxd.worker.attention.step_shape import StepShape
from mlxd.worker.batch import StepBatch, table_starts
from mlxd.worker.cache_tree import with_leaves
from mlxd.worker.forward import PagedForward, SlotForward
from mlxd.worker.fusing import FusedAttention, FusedPair, Tap, fuse_attention, fuse_mlp
from mlxd.worker.kernels.paged import PagedKernels, Rows
from mlxd.worker.kernels.tile import MIN_PART_TOKENS
from mlxd.worker.kv_pool import KvPool
from mlxd.worker.patching import RowSelection
from mlxd.worker.step_sizes import ROW_BUCKETS, ROW_STEP, TOKEN_STEP, at_least, common_size, power_of_two
from mlxd.worker.support import gather_fails
from mlxd.worker.warmup import StepLimits, WarmStep

WARM_CHUNK = 64
"""tokens of a long one"""
MAX_GRAPHS = 128
"""of steps with chunks; the least recently used one is forgotten"""

DecodeStep = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


class MixedSteps:
    """Steps with chunks, by shape.

    A graph is compiled when its shape comes for the second time: that takes longer than the step itself.
    """

    def __init__(self, make: Callable[[StepShape], DecodeStep]) -> None:
        self._make = make
        self._steps: OrderedDict[StepShape, DecodeStep | None] = OrderedDict()

    def get(self, shape: StepShape) -> DecodeStep:
        if shape not in self._steps:
            self._steps[shape] = None
            if len(self._steps) > MAX_GRAPHS:
                self._steps.popitem(last=False)
            return self._make(shape)
        self._steps.move_to_end(shape)
        step = self._steps[shape]
        if step is None:
            step = self._steps[shape] = mx.compile(self._make(shape))
        return step


class KernelForward:
    """One forward over flattened tokens [N, 1], each row with its own position."""

    name = "kernel"
    shares_prefixes = True

    def __init__(
        self,
        model: nn.Module,
        selection: RowSelection,
        pool: KvPool,
        kernels: PagedKernels,
        *,
        one_token_rows: bool = True,
    ) -> None:
        """Joins the model's projections where it can (fusing.py); those before attention only where all rows
        have one token."""
        self._model = model
        self._caches = make_prompt_cache(model)
        self._selection = selection
        self._pool = pool
        self._kernels = kernels
        self._num_kv_heads = min((layer.keys.shape[1] for layer in pool.layers), default=1)
        self._prefill = kernels.serves_prefill(pool.shapes)
        modules = getattr(model, "layers", [])
        fusions: list[FusedAttention | None] = [None] * len(pool.layers)
        self._pairs: list[FusedPair] = []
        if one_token_rows and len(modules) == len(pool.layers):
            fusions = [fuse_attention(module) for module in modules]
        if not one_token_rows or len(modules) == len(pool.layers):
            self._pairs = [pair for pair in map(fuse_mlp, modules) if pair is not None]
        self._taps = [fused.tap for fused in fusions if fused is not None]
        self._layers = [
            KernelLayer(layer, kernels, fused) for layer, fused in zip(pool.layers, fusions, strict=True)
        ]
        self._dtype = pool.dtype
        self._after = mx.zeros((1, 1, 1, 1), dtype=self._dtype)
        self._compiled: dict[tuple[int, int], DecodeStep] = {}
        self._mixed = MixedSteps(self._mixed_step)

    def fallback(self) -> PagedForward | SlotForward:
        """The same model and pool, by gathering; mlx-lm's own caches where that is known to fail."""
        if gather_fails(self._pool.shapes) is not None:
            return SlotForward(self._model)
        return PagedForward(self._model, self._selection, self._pool, "gather")

    def long_steps(self, max_model_len: int) -> Iterator[WarmStep]:
        """A row, and a chunk, that kernels split into parts: those are kernels of their own."""
        if max_model_len >= 2 * MIN_PART_TOKENS:
            yield WarmStep(1, max_model_len)
            yield WarmStep(0, chunks=((MAX_FLAT_TOKENS, max_model_len),))

    def warm_steps(self, limits: StepLimits) -> Iterator[WarmStep]:
        """Every number of rows in the shortest and the longest context, chunks of each kind, what else makes
        a kernel run that was not made for these (to make one takes CUDA a second or two), and full steps.

        Graphs for the contexts between are made when they come.
        """
        max_num_seqs, max_model_len = limits.max_num_seqs, limits.max_model_len
        last = at_least(max_num_seqs, ROW_BUCKETS, ROW_STEP)
        counts = sorted({count for count in _row_buckets(last) if count < max_num_seqs} | {max_num_seqs})
        for count in counts:
            for context in sorted({1, max_model_len}):
                first = count == counts[0] and context == 1
                yield WarmStep(count, context, greedy=count not in (1, max_num_seqs), copies=first)
        decode: set[object] = set()
        for context in sorted({1, *_context_ends(max_model_len), max_model_len}):
            for count in counts:
                made = self._kernels_of(_filled_rows(count, max_num_seqs), context)
                if context not in (1, max_model_len) and not made <= decode:
                    yield WarmStep(count, context, greedy=True)
                decode |= made
        long = min(WARM_CHUNK, max_model_len)
        short = min(MAX_FLAT_TOKENS, max_model_len)
        # A whole prompt and the rest of one, short and long: each alone, because they might attend together.
        kinds = [(long, long), (short, max_model_len)]
        if not self._prefill:
            kinds += [(short, short), (-(-long // 2) + 1, long)]
        room = max_num_seqs - 1
        mixed = [WarmStep(rows, chunks=(kind,)) for kind in kinds for rows in sorted({0, min(1, room), room})]
        yield from mixed
        yield from mixed  # compiled
        # Beside chunks rows come in powers of two, the last of which may be more than ever run alone.
        rows = power_of_two(max(1, room))
        decode |= self._kernels_of(rows, 1)
        for context in (*_context_ends(max_model_len), max_model_len):
            made = self._kernels_of(rows, context)
            if not made <= decode:
                yield WarmStep(room, context, chunks=((long, long),))
            decode |= made
        if self._prefill:
            yield from full_steps(limits)
            return
        one = power_of_two(short)
        flat = self._kernels_of(one, short) | self._kernels_of(one, max_model_len)
        for context in sorted({short, *_context_ends(max_model_len), max_model_len}):
            for rows in _powers_of_two(max_num_seqs * short):
                made = self._kernels_of(rows, context)
                if not made <= flat:
                    count = min(max_num_seqs, max(1, rows // short))
                    yield WarmStep(0, chunks=((min(rows, short), context),) * count)
                flat |= made

    def _kernels_of(self, num_rows: int, max_context: int) -> set[object]:
        """Stands for the decode kernels that attend for such rows, in layers that have seen a step."""
        context = self._context_class(num_rows, max_context)
        kernels: set[object] = set()
        for shape in {shape for layer in self._layers for shape in layer.shapes}:
            splits, tile = self._kernels.plan(shape, num_rows, context)
            kernels.add((shape, splits > 1, tile))
        return kernels

    def release(self, slot: int) -> None:
        """Blocks are the front's; nothing else is kept."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        array = mx.array(list(pairs), dtype=mx.int32)
        for layer in self._layers:
            self._after = layer.copy_blocks(array, self._after)

    def read_blocks(self, block_ids: Sequence[int]) -> mx.array:
        # MLX sees neither that kernels write to the pool nor that they must not yet: a condition that is
        # always true makes this wait for those before, and adding nothing makes those behind wait for this.
        ids = mx.array(list(block_ids), dtype=mx.int32)
        after = self._after
        payload = self._pool.read_blocks(mx.where(after.reshape(1) == after.reshape(1), ids, ids))
        self._after = after + (payload[:1, :1] * 0).reshape(1, 1, 1, 1).astype(after.dtype)
        return payload

    def write_blocks(self, block_ids: Sequence[int], payload: mx.array) -> None:
        block_size = self._pool.block_size
        places = np.asarray(block_ids, dtype=np.int32)[:, None] * block_size + np.arange(block_size)
        array = mx.array(places.reshape(-1).astype(np.int32))
        for layer, parts in zip(self._layers, self._pool.split_blocks(payload), strict=True):
            keys, values = (part.swapaxes(1, 2).flatten(0, 1)[:, :, None] for part in parts)
            self._after = layer.write(keys, values, array, self._after)

    def __call__(self, batch: StepBatch, last_tokens: mx.array) -> tuple[mx.array | None, list[mx.array]]:
        if not batch.chunks:
            packed, num_rows = pack_decode(batch, self._pool.block_size, len(last_tokens) - 1)
            max_context = self._context_class(num_rows, int(batch.context_lens.max()))
            step = self._compiled.get((num_rows, max_context))
            if step is None:
                step = self._compiled[num_rows, max_context] = self._compile(num_rows, max_context)
            logits, self._after = step(mx.array(packed), last_tokens, self._after)
            return logits[: batch.num_decode_rows], [self._after]
        layout = StepLayout.of(
            batch,
            self._pool.block_size,
            self._context_class,
            pad=self._kernels.dialect == "cuda",
            tile_class=self._tile_class if self._prefill else None,
        )
        step = self._mixed.get(layout.shape)
        output, self._after = step(mx.array(layout.packed), last_tokens, self._after)
        if not len(batch.logit_tokens):
            return None, [output, self._after]
        return output[: len(batch.logit_tokens)], [self._after]

    def _context_class(self, num_rows: int, max_context: int) -> int:
        return self._kernels.context_class(num_rows, self._num_kv_heads, max_context)

    def _tile_class(self, num_tiles: int, max_context: int) -> int:
        return self._kernels.tile_class(num_tiles, self._num_kv_heads, max_context)

    def _run(self, tokens: mx.array, rows: StepRows, after: mx.array) -> tuple[mx.array, mx.array]:
        """tokens [N] -> the model's output [n, 1, vocab_size], and what comes after all its kernels."""
        with self._begin(rows, after) as order:
            output: mx.array = self._model(tokens[:, None], cache=with_leaves(self._caches, self._layers))
        return output, order.done

    @contextlib.contextmanager
    def _begin(self, rows: StepRows, after: mx.array) -> Iterator[Order]:
        """For one forward: its rows in all layers, and joint projections."""
        order = Order.begin(after)
        for layer in self._layers:
            layer.begin(rows, order)
        parts: list[Tap | FusedPair] = [*self._taps, *self._pairs]
        for part in parts:
            part.open = True
        try:
            yield order
        finally:
            for part in parts:
                part.open = False
            for layer in self._layers:
                layer.end()

    def _mixed_step(self, shape: StepShape) -> DecodeStep:
        """Of steps that have chunks: logits [num_logits, vocab_size], a hidden state where there are none."""

        def step(packed: mx.array, last_tokens: mx.array, after: mx.array) -> tuple[mx.array, mx.array]:
            arrays = shape.unpack(packed)
            tokens = mx.where(arrays.slots < 0, arrays.token_ids, last_tokens[arrays.slots])
            wanted = arrays.logit_tokens if shape.num_logits else None
            self._selection.select(wanted)
            try:
                output, after = self._run(tokens, StepRows.of(shape, arrays, self._dtype), after)
                selected = self._selection.used
            finally:
                # The self-check goes on with another forward where this one fails.
                self._selection.clear()
            if wanted is None:
                return output[:1], after
            return (output if selected else output[wanted]).squeeze(1), after

        return step

    def _compile(self, num_rows: int, max_context: int) -> DecodeStep:
        def step(packed: mx.array, last_tokens: mx.array, after: mx.array) -> tuple[mx.array, mx.array]:
            slots, rows = unpack_decode(packed, num_rows, max_context)
            logits, after = self._run(last_tokens[slots], rows, after)
            return logits.squeeze(1), after

        compiled: DecodeStep = mx.compile(step)
        return compiled


def full_steps(limits: StepLimits) -> Iterator[WarmStep]:
    """Steps of as many tokens as there can be, beside each number of rows that there may be, and all sizes
    beside as many rows as there can be; twice.

    Such are most steps with chunks while many clients come at once, and while all slots are taken and
    requests come as others end. A new shape takes longer than a step.
    """
    room = limits.max_num_seqs - 1
    # As many logits as rows come in, or twice as many: the ends of prompts are looked at too.
    beside = {min(count, room) for rows in _powers_of_two(room) for count in (rows - 1, rows)}
    full, longest = limits.max_num_batched_tokens, limits.max_model_len
    sizes = sorted({common_size(count, TOKEN_STEP) for count in range(room + 1, full, TOKEN_STEP)} - {full})
    steps = [(rows, full) for rows in sorted(beside, reverse=True)] + [(room, size) for size in sizes]
    for rows, size in steps:
        tokens = min(size, full) - rows
        lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
        if lengths:
            chunks = tuple((length, length) for length in lengths[: limits.max_num_seqs - rows])
            step = WarmStep(rows, chunks=chunks, greedy=True, optional=True)
            yield step
            yield step  # compiled


def pack_decode(batch: StepBatch, block_size: int, scratch_slot: int) -> tuple[npt.NDArray[np.int32], int]:
    """What a step of decode rows needs, in one array: int32 context_lens, table_starts, positions and slots,
    each [R], then the tables, one after another; and R, rounded up. `scratch_slot` comes behind all others.

    Table 0 is NULL_BLOCK's, for the rows that fill up.
    """
    num_rows = batch.num_decode_rows
    padded = _filled_rows(num_rows, scratch_slot)
    tables = batch.block_tables
    capacity = table_capacity(padded)
    while capacity <= len(tables):
        capacity *= 4
    packed = np.zeros(4 * padded + capacity, dtype=np.int32)
    context_lens, starts, positions, slots = packed[: 4 * padded].reshape(4, padded)
    context_lens[:num_rows], context_lens[num_rows:] = batch.context_lens, 1
    starts[:num_rows] = table_starts(batch.context_lens, block_size)[:-1] + 1
    positions[:num_rows] = batch.positions
    slots[:num_rows], slots[num_rows:] = batch.slots, scratch_slot
    packed[4 * padded] = NULL_BLOCK
    packed[4 * padded + 1 : 4 * padded + 1 + len(tables)] = tables
    return packed, padded


def _filled_rows(num_rows: int, max_num_seqs: int) -> int:
    """As many as a step of `num_rows` decode rows is filled up to: no more than may ever run, because rows
    that fill up have recurrent states too, which take memory."""
    return min(at_least(num_rows, ROW_BUCKETS, ROW_STEP), max_num_seqs)


def unpack_decode(packed: mx.array, num_rows: int, max_context: int) -> tuple[mx.array, StepRows]:
    """The slots [R] and rows that `pack_decode` has put one after another."""
    context_lens, starts, positions, slots = (
        packed[index * num_rows : (index + 1) * num_rows] for index in range(4)
    )
    return slots, StepRows(positions, Rows(context_lens, starts, packed[4 * num_rows :], max_context))


def _context_ends(longest: int) -> Iterator[int]:
    """Contexts up to `longest`, one for each way in which rows may be split."""
    context = MIN_PART_TOKENS
    while context < longest:
        yield context
        context *= 2


def _powers_of_two(longest: int) -> Iterator[int]:
    """From 1 to the first that is at least `longest`, 1 where that is 0."""
    return (1 << exponent for exponent in range(max(0, longest - 1).bit_length() + 1))


def _row_buckets(last: int) -> list[int]:
    """All up to `last`, which is one."""
    return [count for count in ROW_BUCKETS if count <= last] + list(
        range(ROW_BUCKETS[-1] + ROW_STEP, last + 1, ROW_STEP)
    )
