"""Chunk sizes follow the latency target, from what steps were seen to cost."""

from __future__ import annotations

from mlxd.engine.cost import IDLE_STEP_FACTOR, MIN_CHUNK_TOKENS, StepCostModel


def learned(per_token: float, decode: float, rows: int = 4) -> StepCostModel:
    model = StepCostModel(max_step_seconds=0.2, max_num_batched_tokens=2048)
    for _ in range(50):
        model.observe(rows, 0, decode)
        model.observe(rows, 64, decode + 64 * per_token)
    return model


def test_starts_carefully_beside_running_streams() -> None:
    model = StepCostModel(0.2, 2048)
    assert MIN_CHUNK_TOKENS <= model.chunk_tokens(4) < model.chunk_tokens(0) <= 2048


def test_chunk_fills_the_step_up_to_the_target() -> None:
    model = learned(per_token=0.001, decode=0.05)
    assert abs(model.chunk_tokens(4) - 150) <= 2
    assert abs(model.chunk_tokens(0) - IDLE_STEP_FACTOR * 200) <= 10


def test_slow_decoding_still_leaves_prefill_its_share() -> None:
    model = learned(per_token=0.001, decode=0.5)
    assert abs(model.chunk_tokens(4) - 500) <= 5


def test_never_below_the_minimum_nor_above_the_budget() -> None:
    assert learned(per_token=1.0, decode=0.01).chunk_tokens(4) == MIN_CHUNK_TOKENS
    fast = learned(per_token=1e-6, decode=0.01)
    assert fast.chunk_tokens(4) == 2044
    assert fast.chunk_tokens(0) == 2048
    assert StepCostModel(0.2, 8).chunk_tokens(8) == 0


def test_unknown_row_counts_borrow_from_the_nearest() -> None:
    model = StepCostModel(0.2, 2048)
    model.observe(1, 0, 0.01)
    model.observe(64, 0, 0.08)
    assert model.decode_seconds(2) == 0.01
    assert model.decode_seconds(100) == 0.08
    assert model.decode_seconds(0) == 0.0


def test_bad_clocks_teach_nothing() -> None:
    model = StepCostModel(0.2, 2048)
    model.observe(4, 0, 0.0)
    model.observe(4, 16, -1.0)
    assert model.decode_seconds(4) == 0.0
    assert model.chunk_tokens(4) == StepCostModel(0.2, 2048).chunk_tokens(4)
