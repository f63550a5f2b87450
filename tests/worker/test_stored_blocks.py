"""Blocks that leave the pool and come back elsewhere hold what they held: the tokens are mlx-lm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxd.worker.identity import weights_digest
from mlxd.worker.runner import Runner
from tests.worker.driver import Driver, Sequence
from tests.worker.metal_shim import shim
from tests.worker.shim_kernels import ShimKernels
from tests.worker.test_runner import prompt_of, reference
from tests.worker.tiny_models import tiny_model

NUM_BLOCKS = 200
BLOCK_SIZE = 4


def drive(model: Any, **options: Any) -> Driver:
    runner = Runner(
        model,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=40,
        **{"dtype": mx.float32} | options,
    )
    return Driver(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


def restored(driver: Driver, source: Sequence, payload: Any) -> Sequence:
    """A sequence with source's prompt over other blocks, which were filled from `payload`."""
    sequence = driver.add(list(source.prompt))
    sequence.blocks = [driver._blocks.pop(0) for _ in payload]
    sequence.num_computed = len(payload) * BLOCK_SIZE
    driver.runner.write_blocks(sequence.blocks, payload)
    return sequence


def check_roundtrip(model: Any, driver: Driver) -> None:
    long, short = driver.add(prompt_of(30, 1)), driver.add(prompt_of(9, 2))
    driver.step(wait=False)
    # Between two steps, one of them in flight: what is read is what the first leaves.
    finish = driver.runner.read_blocks(long.blocks[:7])
    driver.step(wait=False)
    payload = finish()
    assert payload.shape == (7, driver.runner.block_bytes) and payload.dtype == np.uint8
    copies = [restored(driver, long, payload.copy())]
    driver.run(4, wait=False)
    # While nothing runs, and in two pieces.
    payload = driver.runner.read_blocks(long.blocks[:7])()
    copy = restored(driver, long, payload[:3])
    more = [driver._blocks.pop(0) for _ in range(3)]
    driver.runner.write_blocks(more, payload[3:6])
    copy.blocks += more
    copy.num_computed = 6 * BLOCK_SIZE
    copies.append(copy)
    driver.run(6, wait=False)
    for sequence in [long, short, *copies]:
        assert sequence.outputs == reference(model, sequence.prompt, len(sequence.outputs))[0]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_blocks_come_back_as_they_went(name: str) -> None:
    model = tiny_model(name)
    check_roundtrip(model, drive(model))


@pytest.mark.skipif(shim.COMPILER is None, reason="needs g++")
def test_blocks_come_back_as_they_went_through_kernels(tmp_path: Path) -> None:
    mx.disable_compile()
    try:
        model = tiny_model("llama")
        driver = drive(model, kernels=ShimKernels("metal", tmp_path))
        assert driver.runner.attention_name == "kernel"
        check_roundtrip(model, driver)
    finally:
        mx.enable_compile()


@pytest.mark.parametrize("block_ids", [[7], [5, 6, 7, 8, 2], [9, 2, 7, 4, 11, 12, 199]])
def test_half_precision_goes_bit_by_bit(block_ids: list[int]) -> None:
    runner = drive(tiny_model("llama"), dtype=mx.bfloat16).runner
    num_blocks = len(block_ids)
    payload = np.random.default_rng(0).integers(0, 256, (num_blocks, runner.block_bytes), dtype=np.uint8)
    others = [block_id for block_id in range(1, NUM_BLOCKS) if block_id not in block_ids]
    before = runner.read_blocks(others)().copy()
    runner.write_blocks(block_ids, payload)
    assert (runner.read_blocks(block_ids[::-1])() == payload[::-1]).all()
    assert (runner.read_blocks(others)() == before).all()


def test_the_digest_of_the_weights_knows_every_change() -> None:
    model = tiny_model("llama")
    digests = [weights_digest(model), weights_digest(tiny_model("llama"))]
    assert digests[0] == digests[1]
    layer = model.layers[0].self_attn
    for change in (lambda w: w[::-1], lambda w: w[:, ::-1], lambda w: w.astype(mx.bfloat16), lambda w: -w):
        layer.q_proj.weight = change(layer.q_proj.weight)
        digests.append(weights_digest(model))
    assert len(set(digests)) == 5
