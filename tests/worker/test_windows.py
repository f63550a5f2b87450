"""Models with sliding windows, sinks and shared keys over the pool: mlx-lm's tokens, far past the window."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxd.worker.runner import Runner, kv_bytes_per_token
from mlxd.worker.support import layer_shapes
from tests.worker.driver import Driver, Sequence
from tests.worker.test_runner import prompt_of, reference
from tests.worker.tiny_models import WINDOW, WINDOWED, tiny_model

NUM_BLOCKS = 120
BLOCK_SIZE = 4
NUM_OUTPUTS = WINDOW + 2
SHAPES = [(WINDOW - 2, 0), (33, 0), (30, 11), (WINDOW + 3, 1)]
"""lengths of prompts, and of the chunks that they come in (0: one)"""


@cache
def model(name: str) -> nn.Module:
    return tiny_model(name)


def make_driver(name: str) -> Driver:
    runner = Runner(
        model(name), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=8, dtype=mx.float32
    )
    return Driver(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


def check(sequence: Sequence, name: str) -> None:
    tokens, _ = reference(model(name), sequence.prompt, len(sequence.outputs))
    assert len(sequence.outputs) >= NUM_OUTPUTS
    assert sequence.outputs == tokens


@pytest.mark.parametrize("name", WINDOWED)
def test_tokens_are_mlx_lms(name: str) -> None:
    """In one batch: prompts shorter and longer than the window, whole, in chunks and token by token; then one
    of them from blocks shared and copied, and one again from its first token."""
    driver = make_driver(name)
    assert driver.runner.attention_name == "blockwise"
    sequences = [driver.add(prompt_of(length, length), chunk_size=size) for length, size in SHAPES]
    driver.run(2, wait=False)
    sequences.append(driver.fork(sequences[1]))
    driver.preempt(sequences[2])
    driver.run(NUM_OUTPUTS, wait=False)
    for sequence in sequences:
        check(sequence, name)
    assert len({tuple(sequence.outputs) for sequence in sequences}) > 2


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text"])
def test_greedy_is_generate_steps_own(name: str) -> None:
    generate_step = pytest.importorskip("mlx_lm.generate").generate_step
    driver = make_driver(name)
    sequence = driver.add(prompt_of(5 * WINDOW), chunk_size=WINDOW + 1)
    driver.run(5 * WINDOW)
    theirs = [token for token, _ in generate_step(mx.array(sequence.prompt), model(name), max_tokens=30)]
    assert sequence.outputs == theirs


def test_windows_are_what_decides() -> None:
    """The same weights without their windows say something else, or the tests above would show nothing."""
    driver = make_driver("gpt_oss")
    for layer in driver.runner._forward._pool.layers:  # type: ignore[attr-defined]
        layer.window = 0
    sequence = driver.add(prompt_of(33, 33))
    driver.run(NUM_OUTPUTS)
    tokens, _ = reference(model("gpt_oss"), sequence.prompt, NUM_OUTPUTS)
    assert sequence.outputs != tokens


def test_all_of_a_sequence_is_kept() -> None:
    """So that prefixes, preemption and stored blocks are what they are for other models."""
    shapes = layer_shapes(model("gemma3_text"))
    assert [shape.window for shape in shapes] == [WINDOW, WINDOW, 0, WINDOW]
    assert kv_bytes_per_token(model("gemma3_text"), mx.float32) == 4 * 2 * 2 * 16 * 4
