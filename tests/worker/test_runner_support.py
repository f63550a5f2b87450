"""What the paged cache refuses, and what happens when it disagrees with mlx-lm."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxd.worker.attention.blockwise import BlockwiseDecode
from mlxd.worker.attention.gather import GatherDecode
from mlxd.worker.runner import Runner, UnsupportedModelError, check_supported, kv_bytes_per_token
from tests.worker.tiny_models import ARCHITECTURES, tiny_model


def make_runner(model: nn.Module) -> Runner:
    return Runner(model, num_blocks=8, block_size=4, max_num_seqs=4, dtype=mx.float32)


def test_bytes_per_token_are_those_of_the_pool() -> None:
    model = tiny_model("llama")
    num_layers, num_kv_heads, head_dim = 3, 2, 16
    assert kv_bytes_per_token(model, mx.float32) == num_layers * num_kv_heads * 2 * head_dim * 4
    assert kv_bytes_per_token(model, mx.bfloat16) == num_layers * num_kv_heads * 2 * head_dim * 2


def test_rotating_caches_are_refused_by_name() -> None:
    layers = ["full_attention", "sliding_attention"]
    model = tiny_model("llama", num_hidden_layers=2, layer_types=layers, sliding_window=8)
    with pytest.raises(UnsupportedModelError, match="model type 'llama' uses mlx-lm's RotatingKVCache"):
        check_supported(model)
    with pytest.raises(UnsupportedModelError, match="RotatingKVCache"):
        make_runner(model)


def test_ropes_that_need_one_position_for_all_are_refused() -> None:
    model = tiny_model("llama", rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="cannot take a position per row"):
        check_supported(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sinks": mx.zeros(4)}, "attention sinks in layer 0"),
        ({"mask": mx.zeros((1, 1))}, "a mask of its own in layer 0"),
        ({"keys": mx.zeros((2, 2, 1, 8))}, "latent attention"),
        (None, "computes the attention of layer 0 where mlxd cannot reach it"),
    ],
)
def test_attention_of_other_kinds_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any] | None, message: str
) -> None:
    model = tiny_model("llama")
    check_supported(model)
    llama = pytest.importorskip("mlx_lm.models.llama")
    ours = llama.scaled_dot_product_attention

    def changed(queries: mx.array, keys: mx.array, values: mx.array, **arguments: Any) -> mx.array:
        if changes is None:
            return queries
        if hasattr(arguments["cache"], "attend"):
            arguments.update(changes)
        return ours(queries, arguments.pop("keys", keys), values, **arguments)

    changed.mlxd_original = ours  # type: ignore[attr-defined]
    monkeypatch.setattr(llama, "scaled_dot_product_attention", changed)
    with pytest.raises(UnsupportedModelError, match=message):
        check_supported(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_self_check_agrees(name: str) -> None:
    runner = make_runner(tiny_model(name))
    assert runner.self_check() == []
    assert runner.attention_name == "blockwise"


def test_self_check_falls_back_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: object, queries: mx.array, *args: object, **kwargs: object) -> mx.array:
        return queries

    monkeypatch.setattr(BlockwiseDecode, "__call__", wrong)
    runner = make_runner(tiny_model("llama"))
    (warning,) = runner.self_check()
    assert warning.startswith("blockwise attention is off mlx-lm's logits by")
    assert warning.endswith("using gather instead")
    assert runner.attention_name == "gather"

    monkeypatch.setattr(GatherDecode, "__call__", wrong)
    runner = make_runner(tiny_model("llama"))
    assert [warning.rpartition("using ")[2] for warning in runner.self_check()] == [
        "gather instead",
        "mlx-lm instead",
    ]
    assert runner.attention_name == "mlx-lm"


def test_models_stay_usable_with_mlx_lms_own_caches() -> None:
    model = tiny_model("gemma2")
    tokens = mx.arange(6)[None]
    before = model(tokens)
    make_runner(model)
    assert mx.array_equal(model(tokens), before).item()
