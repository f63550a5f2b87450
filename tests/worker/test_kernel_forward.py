"""The runner with our own kernels, which g++ shims run on the CPU: the same tokens as mlx-lm's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxd.worker.attention import chunks
from mlxd.worker.batch import StepBatch
from mlxd.worker.fusing import fuse_attention, fuse_mlp
from mlxd.worker.kernel_forward import pack_decode
from mlxd.worker.patching import patch_attention
from mlxd.worker.runner import Runner
from mlxd.worker.warmup import WarmStep
from tests.worker.driver import Driver
from tests.worker.metal_shim import shim
from tests.worker.metal_shim.shim import ShimKernel
from tests.worker.shim_kernels import ShimKernels
from tests.worker.test_prompt_logprobs import check_prompt
from tests.worker.test_runner import prompt_of, reference
from tests.worker.tiny_models import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.skipif(shim.COMPILER is None, reason="needs g++")

NUM_BLOCKS = 200
BLOCK_SIZE = 4
SHAPES = [(13, 0), (40, 0), (60, 7), (5, 2), (70, 31), (66, 33), (68, 34)]
"""lengths of prompts, and of the chunks that they come in (0: one)"""


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled() -> Iterator[None]:
    """The shims evaluate what they are given, which no traced function may."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def kernel_runner(model: nn.Module, kernels: ShimKernels, *, num_snapshots: int = 0) -> Runner:
    return Runner(
        model,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=40,
        dtype=mx.float32,
        kernels=kernels,
        num_snapshots=num_snapshots,
    )


@pytest.mark.parametrize(
    ("name", "dialect", "matrix_units"),
    [
        ("llama-windows", "metal", False),
        ("qwen3", "cuda", False),
        ("qwen3", "cuda", True),
        ("gemma2", "metal", False),
        ("llama-yarn", "cuda", False),
        ("gpt_oss", "cuda", False),
        ("gpt_oss", "cuda", True),
    ],
)
def test_tokens_are_mlx_lms(
    name: str, dialect: Any, matrix_units: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MAX_GATHERED_TOKENS", 200)
    model = tiny_model(name)
    kernels = ShimKernels(dialect, folder, matrix_units=matrix_units)
    runner = kernel_runner(model, kernels)
    assert runner.attention_name == "kernel"
    driver = Driver(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    sequences = [driver.add(prompt_of(length, length), chunk_size=size) for length, size in SHAPES]
    driver.run(5, wait=False)
    copy = driver.fork(sequences[0])
    driver.preempt(sequences[1])
    driver.run(6, wait=False)
    ours = {"write", "take"} if name in ("llama-yarn", "gpt_oss") else {"place"}
    ours.add("prefill" if matrix_units else "gather")
    assert set(kernels.launches) - {"copy"} == {"decode", "collect"} | ours
    for sequence in [*sequences, copy]:
        tokens, _ = reference(model, sequence.prompt, len(sequence.outputs))
        assert sequence.outputs == tokens


def test_prompts_logprobs_are_mlx_lms(folder: Path) -> None:
    model = tiny_model("llama")
    driver = Driver(
        kernel_runner(model, ShimKernels("metal", folder)), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE
    )
    shapes = [(23, 9), (40, 0)]
    sequences = [driver.add(prompt_of(n, n), chunk_size=size, prompt_logprobs=2) for n, size in shapes]
    driver.add(prompt_of(7, 1))
    driver.run(3, wait=False)
    for sequence in sequences:
        check_prompt(model, sequence)


def test_blocks_are_copied_before_they_are_read(folder: Path) -> None:
    model = tiny_model("llama")
    kernels = ShimKernels("metal", folder)
    driver = Driver(kernel_runner(model, kernels), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    source = driver.add(prompt_of(15))
    driver.run(2)
    copy = driver.fork(source)
    driver.run(8)
    assert kernels.launches["copy"] == len(model.layers)
    tokens, _ = reference(model, source.prompt, 10)
    assert copy.outputs == tokens[:8]
    assert source.outputs == tokens


def test_long_rows_are_split(folder: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=8192)
    kernels = ShimKernels("metal", folder, num_cores=64)
    runner = Runner(model, num_blocks=300, block_size=16, max_num_seqs=4, dtype=mx.float32, kernels=kernels)
    driver = Driver(runner, num_blocks=300, block_size=16)
    sequences = [driver.add(prompt_of(1100)), driver.add(prompt_of(3, 1))]
    driver.run(3)
    assert kernels.launches["merge"] > 0
    for sequence in sequences:
        tokens, _ = reference(model, sequence.prompt, len(sequence.outputs))
        assert sequence.outputs == tokens


@pytest.mark.parametrize(
    ("name", "dialect", "matrix_units"), [("llama", "metal", False), ("qwen3", "cuda", True)]
)
def test_after_the_warm_up_no_kernel_is_new(
    name: str, dialect: Any, matrix_units: bool, folder: Path
) -> None:
    # So many cores that rows are split at 1,024 tokens, and that 16 rows make for other groups than 4.
    kernels = ShimKernels(dialect, folder, 24, matrix_units=matrix_units)
    model = tiny_model(name, max_position_embeddings=4096)
    runner = Runner(model, num_blocks=150, block_size=32, max_num_seqs=6, dtype=mx.float32, kernels=kernels)
    runner.warmup(1030, transfers=True)
    made: list[str] = []
    driver = Driver(runner, num_blocks=150, block_size=32, num_slots=6)
    shapes = [*SHAPES[:3], (150, 0), (160, 140)]
    sequences = [driver.add(prompt_of(length, length), chunk_size=size) for length, size in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShimKernel, "__init__", lambda self, text, *rest: made.append(text.name))
        driver.run(5)
        copy = driver.fork(sequences[0])
        driver.run(2)
        runner.write_blocks([149], runner.read_blocks([149])())
        for rows, context in ((1, 40), (1, 1030), (2, 1030), (5, 40), (5, 1030)):
            runner.launch(WarmStep(rows, context).plan(32)).result()
            for length in (1, 9):
                runner.launch(WarmStep(0, chunks=((length, context),) * rows).plan(32)).result()
    assert not made
    for sequence in [*sequences, copy]:
        assert sequence.outputs == reference(model, sequence.prompt, len(sequence.outputs))[0]


def test_self_check_falls_back_to_gather(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_runner(tiny_model("qwen3"), ShimKernels("metal", folder)).self_check() == []

    def failing(*args: object, **kwargs: object) -> list[mx.array]:
        raise RuntimeError("no such built-in\nmore words")

    monkeypatch.setattr(ShimKernels, "_run", failing)
    runner = kernel_runner(tiny_model("qwen3"), ShimKernels("metal", folder))
    warnings = runner.self_check()
    assert warnings == ["kernel attention fails: no such built-in; using gather instead"]
    assert runner.attention_name == "gather"

    def wrong(self: ShimKernels, text: object, inputs: object, **sizes: Any) -> list[mx.array]:
        pairs = zip(sizes["shapes"], sizes["dtypes"], strict=True)
        return [mx.ones(shape, dtype=dtype) for shape, dtype in pairs]

    monkeypatch.setattr(ShimKernels, "_run", wrong)
    runner = kernel_runner(tiny_model("qwen3"), ShimKernels("metal", folder))
    (warning,) = runner.self_check()
    assert warning.startswith("kernel attention is off mlx-lm's logits by")
    driver = Driver(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    sequence = driver.add(prompt_of(13))
    driver.run(5)
    assert sequence.outputs == reference(runner._model, sequence.prompt, 5)[0]


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_self_check_tries_what_only_long_contexts_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    model = tiny_model("qwen3", max_position_embeddings=4096)
    kernels = ShimKernels("cuda", folder, 24, matrix_units=True)
    runner = kernel_runner(model, kernels)
    assert runner.self_check(1000) == []
    assert "merge" not in kernels.launches
    assert runner.self_check(1030) == []
    assert kernels.launches["merge"] == 2 * len(model.layers)
    run = kernels._run

    def fail_if_split(text: Any, *args: Any, **kwargs: Any) -> list[mx.array]:
        if text.name.split("_")[1] == "prefill" and "parts" in text.output_names:
            raise error("too many registers\nmore words")
        return run(text, *args, **kwargs)

    monkeypatch.setattr(kernels, "_run", fail_if_split)
    words = "kernel attention fails in long contexts: too many registers; using gather instead"
    assert runner.self_check(1030) == [words]
    assert runner.attention_name == "gather"


FUSED = {
    **dict.fromkeys(ARCHITECTURES, (True, True)),
    "llama-yarn": (False, True),
    "phi3": (False, False),
    "qwen3_moe": (True, False),
    "mixtral": (True, False),
    "starcoder2": (True, False),
    "olmo2": (False, True),
    "gpt2": (False, False),
}
"""Which models have their attention's and their MLP's projections joined."""


@pytest.mark.parametrize("name", FUSED)
def test_joined_projections_change_nothing(name: str) -> None:
    model = patched(name)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    before = model(tokens)
    size = sum(array.nbytes for array in _arrays(model))
    attentions = [fuse_attention(layer) for layer in model.layers]
    pairs = [fuse_mlp(layer) for layer in model.layers]
    assert {(a is not None, b is not None) for a, b in zip(attentions, pairs, strict=True)} == {FUSED[name]}
    assert mx.array_equal(model(tokens), before).item()
    assert sum(array.nbytes for array in _arrays(model)) == size
    for pair in pairs:
        if pair is not None:
            pair.open = True
    np.testing.assert_allclose(np.array(model(tokens)), np.array(before), atol=2e-5)


def patched(name: str, **overrides: Any) -> nn.Module:
    """A model whose attention goes to its cache, as a Runner leaves it."""
    model = tiny_model(name, **overrides)
    patch_attention(model)
    return model


def _arrays(model: nn.Module) -> list[mx.array]:
    return [array for _, array in tree_flatten(model.parameters())]


def test_layers_that_do_not_rotate_keep_their_own_way() -> None:
    """Every other layer of smollm3 has no position embedding, though its module has a rope."""
    fused = [fuse_attention(layer) for layer in patched("smollm3").layers]
    assert [attention is not None for attention in fused] == [True, False]


def test_quantised_projections_are_joined_too() -> None:
    model = patched("llama", head_dim=32)
    nn.quantize(model, group_size=32, bits=4)
    x = mx.random.normal((3, 1, 64), key=mx.random.key(1))
    layer = model.layers[0]
    before = layer.mlp(x)
    assert fuse_attention(layer) is not None
    pair = fuse_mlp(layer)
    assert pair is not None
    pair.open = True
    np.testing.assert_allclose(np.array(layer.mlp(x)), np.array(before), atol=1e-5)


def test_steps_are_packed_and_filled_up() -> None:
    tables = np.array([5, 6, 7, 8, 9, 10, 11], dtype=np.int32)
    contexts = np.array([9, 4, 12], dtype=np.int32)
    batch = StepBatch(
        num_decode_rows=3,
        slots=np.array([2, 0, 6], dtype=np.int32),
        context_lens=contexts,
        token_ids=np.zeros(0, dtype=np.int32),
        positions=contexts - 1,
        slot_mapping=np.zeros(3, dtype=np.int32),
        block_tables=tables,
        sampled_rows=np.arange(3),
        logit_tokens=np.arange(3, dtype=np.int32),
        chunks=[],
    )
    packed, num_rows = pack_decode(batch, 4, scratch_slot=40)
    assert num_rows == 4
    lens, starts, positions, slots = packed[:16].reshape(4, 4).tolist()
    assert lens == [9, 4, 12, 1]
    assert positions == [8, 3, 11, 0]
    assert slots == [2, 0, 6, 40]
    blocks = packed[16:]
    assert [blocks[start] for start in starts] == [5, 8, 9, 0]
    assert blocks[:8].tolist() == [0, 5, 6, 7, 8, 9, 10, 11]
    assert len(blocks) == 1024
    full = replace(batch, slots=np.arange(3, dtype=np.int32))
    assert [pack_decode(full, 4, scratch_slot=slot)[1] for slot in (3, 4)] == [3, 4]


@pytest.mark.parametrize(
    ("name", "dialect", "matrix_units"),
    [("qwen3_5", "metal", False), ("falcon_h1", "cuda", True)],
)
def test_tokens_are_mlx_lms_beside_recurrent_state(
    name: str, dialect: Any, matrix_units: bool, folder: Path
) -> None:
    model = tiny_model(name)
    kernels = ShimKernels(dialect, folder, matrix_units=matrix_units)
    runner = kernel_runner(model, kernels, num_snapshots=1)
    assert runner.attention_name == "kernel" and runner.shares_prefixes
    driver = Driver(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    kept = driver.add(prompt_of(BLOCK_SIZE + 1), chunk_size=BLOCK_SIZE)
    driver.save(kept, 0)
    sequences = [driver.add(prompt_of(length, length), chunk_size=size) for length, size in SHAPES[:5]]
    driver.run(3, wait=False)
    goes_on = driver.resume(0, kept.blocks[:1], [*kept.prompt[:BLOCK_SIZE], *prompt_of(6, 2)], chunk_size=4)
    sequences += [kept, goes_on]
    driver.preempt(sequences[1])
    driver.run(5, wait=False)
    kinds = {"write", "decode", "take", "collect", "prefill" if matrix_units else "gather"}
    assert set(kernels.launches) == kinds
    for sequence in sequences:
        tokens, _ = reference(model, sequence.prompt, len(sequence.outputs))
        assert sequence.outputs == tokens
