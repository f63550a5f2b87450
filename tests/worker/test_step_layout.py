"""Layouts of steps with chunks: every token has its place, and graphs of one shape serve any step of it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxd.worker.attention.layout import Chunk, StepLayout
from mlxd.worker.batch import StepBatch, table_starts
from mlxd.worker.kernel_forward import MAX_GRAPHS, KernelForward, MixedSteps, full_steps
from mlxd.worker.kernels.paged import PagedKernels
from mlxd.worker.kernels.tile import TILE_QUERIES
from mlxd.worker.kv_pool import KvPool
from mlxd.worker.patching import patch_attention, patch_projection
from mlxd.worker.step_sizes import ROW_BUCKETS, ROW_STEP, at_least, common_size, power_of_two
from mlxd.worker.support import layer_shapes
from mlxd.worker.warmup import StepLimits
from tests.worker.tiny_models import tiny_model

BLOCK_SIZE = 4
NUM_SLOTS = 80


def batch_of(
    decode: list[int], chunks: list[tuple[int, int]], seed: int = 0, block_size: int = BLOCK_SIZE
) -> StepBatch:
    """Decode rows of these contexts, then chunks of (length, context), on random blocks."""
    rng = np.random.default_rng(seed)
    lengths = [1] * len(decode) + [length for length, _ in chunks]
    contexts = np.array(decode + [context for _, context in chunks], dtype=np.int32)
    starts = np.cumsum(lengths) - lengths
    first = table_starts(contexts, block_size)
    tables = rng.permutation(int(first[-1])).astype(np.int32) + 1
    positions = np.concatenate(
        [np.arange(context - n, context) for n, context in zip(lengths, contexts, strict=True)]
    ).astype(np.int32)
    rows = np.repeat(np.arange(len(contexts)), lengths)
    return StepBatch(
        num_decode_rows=len(decode),
        slots=rng.permutation(NUM_SLOTS)[: len(contexts)].astype(np.int32),
        context_lens=contexts,
        token_ids=rng.integers(0, 90, sum(lengths) - len(decode)).astype(np.int32),
        positions=positions,
        slot_mapping=tables[first[rows] + positions // block_size] * block_size + positions % block_size,
        block_tables=tables,
        sampled_rows=np.arange(len(contexts)),
        logit_tokens=(np.cumsum(lengths) - 1).astype(np.int32),
        chunks=[
            Chunk(row, int(starts[row]), lengths[row], int(contexts[row]))
            for row in range(len(decode), len(contexts))
        ],
    )


def context_class(num_rows: int, max_context: int) -> int:
    return max_context


def fixed(num_rows: int, max_context: int) -> int:
    return 512


def check(batch: StepBatch, *, pad: bool, prefill: bool) -> None:
    """Each token is where `collected` says, with its own place in the pool and its own sequence."""
    layout = StepLayout.of(
        batch, BLOCK_SIZE, context_class, pad=pad, tile_class=context_class if prefill else None
    )
    shape, arrays = layout.shape, layout.shape.unpack(mx.array(layout.packed))
    tables = np.array(arrays.tables)
    single = arrays.decode, arrays.flat, arrays.tiled
    parts: list[Any] = [part for part in single if part is not None] + arrays.longs
    rows = np.repeat(
        np.arange(len(batch.context_lens)),
        np.diff([*range(batch.num_decode_rows), *(c.start for c in batch.chunks), len(batch.positions)]),
    )
    collected = np.array(arrays.collected)[: len(batch.positions)]
    for token, (source, sequence, place, length) in enumerate(collected.tolist()):
        part, row, context = parts[source], rows[token], int(batch.positions[token]) + 1
        own = batch.block_tables[table_starts(batch.context_lens, BLOCK_SIZE)[row] :][
            : -(-context // BLOCK_SIZE)
        ]
        if part in arrays.longs:
            long = shape.longs[arrays.longs.index(part)]
            assert (length, int(part.slot_mapping[-1])) == (long.length, long.length)
            assert int(part.lengths[sequence]) == batch.context_lens[row]
            assert int(part.first[sequence]) + place == batch.positions[token]
            np.testing.assert_array_equal(np.array(part.tables)[sequence, : len(own)], own)
        else:
            assert (place, length) == (0, 1)
            if part is arrays.tiled:
                (tile,) = (t for t in part.tiles.tolist() if t[0] <= sequence < t[0] + t[1])
                assert tile[1] <= TILE_QUERIES
                assert tile[2] + sequence - tile[0] + 1 == context
                start = tile[3]
            else:
                inner = part if part is arrays.decode else part.rows
                assert int(inner.context_lens[sequence]) == context
                start = int(inner.table_starts[sequence])
            np.testing.assert_array_equal(tables[start : start + len(own)], own)
        if part is not arrays.decode:
            at = sequence * length + place
            assert int(part.tokens[at]) == token
            assert int(part.slot_mapping[at]) == batch.slot_mapping[token]
    slots, token_ids = np.array(arrays.slots), np.array(arrays.token_ids)
    split = batch.num_decode_rows
    assert slots[:split].tolist() == batch.slots[:split].tolist()
    assert (slots[split:] == -1).all()
    assert token_ids[split : len(batch.positions)].tolist() == batch.token_ids.tolist()


def test_every_token_has_its_place() -> None:
    rng = random.Random(0)
    for seed in range(30):
        chunks = []
        for _ in range(rng.randrange(1, 6)):
            length = rng.choice([1, 2, 16, 17, 60, 130])
            chunks.append((length, length + rng.choice([0, 0, 3, 90])))
        decode = [rng.randrange(1, 150) for _ in range(rng.choice([0, 1, 3, 9]))]
        check(batch_of(decode, chunks, seed), pad=seed % 2 == 0, prefill=seed % 3 == 0)


def test_chunks_of_a_kind_attend_together() -> None:
    def calls(*chunks: tuple[int, int], pad: bool = True, prefill: bool = False) -> list[tuple[int, ...]]:
        """Rows of one query, if there are, tiles, if there are, then calls."""
        batch = batch_of([], list(chunks))
        shape = StepLayout.of(
            batch, BLOCK_SIZE, context_class, pad=pad, tile_class=context_class if prefill else None
        ).shape
        flat = [] if shape.flat is None else [(shape.flat.num_rows,)]
        tiled = [] if shape.tiled is None else [(shape.tiled.num_tokens, shape.tiled.num_tiles)]
        return [*flat, *tiled, *((long.num_chunks, long.length, long.size) for long in shape.longs)]

    assert calls((600, 600), (440, 600), (600, 600), pad=False) == [(2, 600, 600), (1, 440, 600)]
    assert calls((600, 600), (580, 580)) == [(2, 640, 640)]
    assert calls((1500, 1500), (20, 6000)) == [(1, 1536, 1536), (1, 64, 6144)]
    assert calls((600, 600), (2, 9000)) == [(2,), (1, 640, 640)]
    assert calls((600, 600), (440, 600), (2, 9000), prefill=True) == [(1280, 64)]


def test_sizes_of_steps_and_chunks_are_few_and_not_much_larger() -> None:
    padded = {size: common_size(size, 64) for size in range(1, 20_000, 7)}
    assert len(set(padded.values())) < 40
    assert all(size <= there <= max(64 * -(-size // 64), 1.25 * size + 64) for size, there in padded.items())


class SumKernels(PagedKernels):
    """Every output follows from every input, by operations that MLX can trace. They attend to nothing."""

    def _run(
        self, text: Any, inputs: list[mx.array], *, shapes: list[Any], dtypes: list[Any], **_: object
    ) -> list[mx.array]:
        total = mx.zeros(())
        for weight, array in enumerate(inputs, 1):
            flat = array.reshape(-1).astype(mx.float32)
            total = total + (flat * mx.cos(mx.arange(flat.size) + weight)).mean()
        return [
            mx.broadcast_to(mx.sin(total), shape).astype(d) for shape, d in zip(shapes, dtypes, strict=True)
        ]


@pytest.mark.parametrize(
    ("name", "prefill"), [("qwen3", False), ("qwen3", True), ("llama-yarn", False), ("llama-yarn", True)]
)
def test_a_graph_takes_all_numbers_from_its_step(name: str, prefill: bool) -> None:
    """Traced with one step, it gives for another of its shape what it gives untraced."""
    model = tiny_model(name)
    patch_attention(model)
    selection = patch_projection(model, model.args.vocab_size)
    pool = KvPool(layer_shapes(model), 300, BLOCK_SIZE, mx.float32)
    forward = KernelForward(model, selection, pool, SumKernels("cuda", 4))
    batches = (
        batch_of([9, 30, 4], [(70, 70), (5, 21), (70, 100)], 1),
        batch_of([12, 25, 8], [(66, 66), (6, 30), (80, 110)], 2),
    )
    first, other = (
        StepLayout.of(batch, BLOCK_SIZE, fixed, pad=True, tile_class=fixed if prefill else None)
        for batch in batches
    )
    assert first.shape == other.shape
    rest = mx.arange(NUM_SLOTS + 1, dtype=mx.int32), mx.zeros((1, 1, 1, 1))
    step = forward._mixed_step(first.shape)
    compiled = mx.compile(step)
    for layout in (first, other):
        expected, output = (run(mx.array(layout.packed), *rest)[0] for run in (step, compiled))
        assert output.shape == (8, model.args.vocab_size)
        np.testing.assert_allclose(np.array(output), np.array(expected), atol=1e-5)
    assert not np.allclose(np.array(output), np.array(step(mx.array(first.packed), *rest)[0]), atol=1e-3)


def test_rows_beside_chunks_are_warmed_up_too() -> None:
    """Ten rows run as 12, nine beside a chunk as 16, which here make for smaller thread groups."""
    model = tiny_model("llama")
    patch_attention(model)
    selection = patch_projection(model, model.args.vocab_size)
    pool = KvPool(layer_shapes(model), 300, BLOCK_SIZE, mx.float32)
    forward = KernelForward(model, selection, pool, SumKernels("metal", 30))
    forward._layers[0].shape(4, 0.25, None, False)
    warm = {
        kernel
        for step in forward.warm_steps(StepLimits(10, 1030))
        if step.num_decode_rows
        for kernel in forward._kernels_of(
            power_of_two(step.num_decode_rows)
            if step.chunks
            else at_least(step.num_decode_rows, ROW_BUCKETS, ROW_STEP),
            step.context_len,
        )
    }
    for context in (1, 600, 1025):
        for rows in (1, 2, 4, 8, 12, 16):
            assert forward._kernels_of(rows, context) <= warm


def test_full_steps_are_warmed_up() -> None:
    """As they are while clients come with prompts of 600 tokens; in contexts that make for no splits."""

    def shape_of(batch: StepBatch) -> Any:
        return StepLayout.of(batch, 16, fixed, pad=True, tile_class=fixed).shape

    limits = StepLimits(64, 40_000, 2048)
    steps = list(full_steps(limits))
    assert all(steps.count(step) == 2 and step.optional for step in steps)
    warm = {shape_of(StepBatch.from_plan(step.plan(16))) for step in steps}
    # 12 of full steps, and as many as there are other sizes.
    assert len(warm) == 12 + len({common_size(count, 64) for count in range(64, 2048)} - {2048})
    for rows in range(3, 64):
        tokens = 2048 - rows
        lengths = [600, 600, 600, tokens - 1800][: 64 - rows]
        chunks = [(length, min(600, length + 50)) for length in lengths]
        batch = batch_of([500] * rows, chunks, block_size=16)
        if sum(lengths) == tokens:
            assert shape_of(batch) in warm
            assert shape_of(replace(batch, logit_tokens=batch.logit_tokens[:-1])) in warm
    # Where sequences are short, more of them.
    short = [step for step in full_steps(StepLimits(8, 512, 2048)) if step.num_decode_rows == 3]
    assert [sum(length for length, _ in step.chunks) for step in short] == [2045, 2045]


def test_full_steps_are_no_more_than_there_may_be() -> None:
    for limits in itertools.starmap(StepLimits, itertools.product(range(1, 40), (17, 4096), (64, 100, 300))):
        steps = list(full_steps(limits))
        rows = {step.num_decode_rows for step in steps}
        assert max(rows, default=0) == min(limits.max_num_seqs, limits.max_num_batched_tokens) - 1
        for step in steps:
            assert step.chunks
            assert step.num_decode_rows + len(step.chunks) <= limits.max_num_seqs
            lengths = [length for length, _ in step.chunks]
            assert step.num_decode_rows + sum(lengths) <= limits.max_num_batched_tokens
            assert all(1 <= length <= limits.max_model_len for length in lengths)


def test_graphs_are_compiled_the_second_time_and_forgotten_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(mx, "compile", lambda step: compiled.append(step) or step)
    steps = MixedSteps(lambda shape: lambda *_: (mx.array(0), mx.array(0)))
    shapes = [
        StepLayout.of(batch_of([], [(n, n)]), BLOCK_SIZE, context_class, pad=False).shape
        for n in range(20, 21 + MAX_GRAPHS)
    ]
    steps.get(shapes[0])
    assert not compiled
    kept = steps.get(shapes[0])
    assert len(compiled) == 1
    assert steps.get(shapes[0]) is kept
    for shape in shapes[1:]:
        steps.get(shape)
    assert len(compiled) == 1
    steps.get(shapes[0])  # forgotten: not compiled at once
    assert len(compiled) == 1
