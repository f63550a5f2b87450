"""The memory plan: what wins, what cuts, and refusals that say the numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from mlxd.errors import ConfigError
from mlxd.worker.kernels.paged import PagedKernels
from mlxd.worker.memory import (
    CUDA_LAYERS,
    LATENT_COPIES,
    LOGITS_COPIES,
    MIB,
    SCORES_BYTES,
    ModelShape,
    PoolPlan,
    activation_bytes,
    check_weights_fit,
    plan_pool,
)
from mlxd.worker.mlx_backend import prefill_cores
from mlxd.worker.platform import Device
from tests.worker.tiny_models import tiny_model

DEVICE = Device("cpu", "test", total_bytes=1000 * MIB, memory_bytes=900 * MIB, available_bytes=900 * MIB)
SHAPE = ModelShape(
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_layers=2,
    vocab_size=1000,
)
KV_BYTES = 1024


def plan(
    cache: CacheConfig | None = None,
    *,
    weights_mib: int = 100,
    context: int | None = 4096,
    max_model_len: int | None = None,
    device: Device = DEVICE,
    kv_bytes: int = KV_BYTES,
    state_mib: int = 0,
    **scheduler: Any,
) -> PoolPlan:
    config = Config(
        model=ModelConfig(max_model_len=max_model_len),
        cache=cache or CacheConfig(),
        scheduler=SchedulerConfig(**scheduler),
    )
    return plan_pool(
        config,
        device,
        SHAPE,
        weights_bytes=weights_mib * MIB,
        kv_bytes_per_token=kv_bytes,
        dtype_bytes=4,
        model_context=context,
        state_bytes=state_mib * MIB,
    )


def test_a_share_of_the_device_by_default() -> None:
    pool = plan()
    assert pool.memory.kv_pool_bytes == 200 * MIB == pool.num_blocks * 16 * KV_BYTES
    assert pool.max_model_len == 4096
    assert pool.warnings == ()


def test_megabytes_win_over_the_share_and_blocks_over_both() -> None:
    assert plan(CacheConfig(memory_mb=50)).memory.kv_pool_bytes == 50 * MIB
    assert plan(CacheConfig(memory_mb=50, num_blocks=77)).num_blocks == 77


def test_never_more_than_all_requests_could_use() -> None:
    pool = plan(max_num_seqs=4, max_model_len=100)
    assert pool.num_blocks == 1 + 4 * 7
    assert pool.max_model_len == 100


def test_weights_and_activations_come_first() -> None:
    pool = plan(CacheConfig(memory_mb=800), weights_mib=500)
    memory = pool.memory
    assert memory.weights_bytes + memory.activation_bytes + memory.kv_pool_bytes <= DEVICE.memory_bytes
    assert "instead of cache.memory_mb 800" in pool.warnings[0]


def test_a_pool_smaller_than_the_context_limits_requests() -> None:
    pool = plan(CacheConfig(memory_mb=1))
    assert pool.max_model_len == (pool.num_blocks - 1) * 16 == 1008
    assert "limited to 1008 tokens, not 4096" in pool.warnings[0]


def test_too_little_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"would hold 0 tokens, at least 256 .* weights take 895\.0 MiB"):
        plan(weights_mib=895)
    with pytest.raises(ConfigError, match=r"num_blocks 90000 takes 1,406\.2 MiB, but of the 900\.0 MiB"):
        plan(CacheConfig(num_blocks=90000))
    with pytest.raises(ConfigError, match=r"weights take 901\.0 MiB, but the cpu device has 900\.0 MiB"):
        check_weights_fit(DEVICE, 901 * MIB)
    check_weights_fit(DEVICE, 900 * MIB)


def test_memory_that_others_use_is_a_warning() -> None:
    pool = plan(device=replace(DEVICE, available_bytes=100 * MIB))
    assert "100.0 MiB are free" in pool.warnings[0]


def test_a_model_without_a_context_length_needs_one() -> None:
    assert plan(context=None, max_model_len=512).max_model_len == 512
    with pytest.raises(ConfigError, match=r"model\.max_model_len"):
        plan(context=None)


def test_states_have_their_part_of_the_cache() -> None:
    """New states are made beside the old ones, of up to twelve layers at once, and there are two. A quarter
    of the cache is for those that are kept."""
    few = plan(state_mib=2, max_num_seqs=8)
    assert few.memory.state_bytes == 8 * 4 * MIB and few.max_num_seqs == 8 and few.warnings == ()
    assert few.memory.kv_pool_bytes == 8 * 4096 * KV_BYTES + 16 * KV_BYTES
    assert few.num_snapshots == 25 and few.memory.snapshot_bytes == 50 * MIB
    pool = plan(CacheConfig(memory_mb=80), state_mib=2, max_num_seqs=16)
    assert pool.memory.state_bytes == 10 * 4 * MIB == 2 * pool.memory.kv_pool_bytes
    assert pool.max_num_seqs == 10 == pool.num_snapshots and pool.memory.snapshot_bytes == 20 * MIB
    assert "10 sequences run at once, not scheduler.max_num_seqs 16" in pool.warnings[0]
    one = plan(CacheConfig(memory_mb=60), state_mib=2, max_num_seqs=16, continuous_batching=False)
    assert one.memory.state_bytes == 4 * MIB and one.max_num_seqs == 1 and one.warnings == ()


def test_states_are_kept_in_the_part_that_is_for_them() -> None:
    none = plan(CacheConfig(memory_mb=80, snapshot_percent=0), state_mib=2, max_num_seqs=16)
    assert none.num_snapshots == none.memory.snapshot_bytes == 0
    assert none.memory.kv_pool_bytes == none.memory.state_bytes == 40 * MIB
    for cache in (CacheConfig(prefix_caching=False), CacheConfig(paged=False)):
        assert plan(cache, state_mib=2).num_snapshots == 0
    one = plan(CacheConfig(memory_mb=80), state_mib=20, max_num_seqs=1)
    assert one.num_snapshots == 1 and one.warnings == ()
    large = plan(CacheConfig(memory_mb=160), state_mib=40, kv_bytes=0, max_num_seqs=2, context=512)
    assert large.max_num_seqs == 1 and large.num_snapshots == 1
    alone = plan(CacheConfig(memory_mb=90), state_mib=40, kv_bytes=0, max_num_seqs=1)
    assert alone.num_snapshots == 0 and alone.memory.state_bytes == 80 * MIB
    assert "prefixes are not shared: a state where one ends takes 40.0 MiB" in alone.warnings[0]
    blocks = plan(CacheConfig(num_blocks=10000), state_mib=2, max_num_seqs=8)
    assert blocks.num_snapshots == 25 and blocks.num_blocks == 10000


def test_states_are_kept_only_beside_a_pool_of_some_use() -> None:
    """A cache that is enough without them is not refused for their sake."""
    tight = plan(CacheConfig(memory_mb=8), state_mib=1, kv_bytes=10 * 1024, max_num_seqs=2)
    assert tight.memory.state_bytes == 4 * MIB and tight.num_snapshots == 1
    assert tight.max_model_len > 256
    tighter = plan(CacheConfig(memory_mb=6), state_mib=1, kv_bytes=10 * 1024, max_num_seqs=2)
    assert tighter.max_num_seqs == 1 and tighter.num_snapshots == 1
    none = plan(CacheConfig(memory_mb=8), state_mib=1, kv_bytes=14 * 1024, max_num_seqs=2)
    assert none.num_snapshots == 0 and "prefixes are not shared" in none.warnings[0]


def test_blocks_that_are_asked_for_by_number_leave_states_the_rest() -> None:
    cache = CacheConfig(num_blocks=40000)
    pool = plan(cache, state_mib=10)
    assert pool.num_blocks == 40000
    assert 0 < pool.max_num_seqs * 20 * MIB == pool.memory.state_bytes < 175 * MIB
    with pytest.raises(
        ConfigError, match=r"the state of a sequence takes 400\.0 MiB, and for states there are"
    ):
        plan(cache, state_mib=200)


def test_a_model_that_keeps_states_alone_has_blocks_that_take_nothing() -> None:
    pool = plan(CacheConfig(memory_mb=60), kv_bytes=0, state_mib=2, max_num_seqs=30)
    assert pool.memory.kv_pool_bytes == 0
    assert pool.max_num_seqs == 11 and pool.num_snapshots == 7
    assert pool.num_blocks == 1 + 11 * 4096 // 16
    assert pool.max_model_len == 4096


@given(
    state_mib=st.integers(0, 100),
    memory_mb=st.integers(1, 2000),
    weights_mib=st.integers(1, 1000),
    block_size=st.integers(1, 256),
    max_num_seqs=st.integers(1, 512),
    max_num_batched_tokens=st.integers(1, 8192),
)
def test_what_is_planned_always_fits(
    state_mib: int,
    memory_mb: int,
    weights_mib: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> None:
    try:
        pool = plan(
            CacheConfig(memory_mb=memory_mb, block_size=block_size),
            weights_mib=weights_mib,
            state_mib=state_mib,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
    except ConfigError:
        return
    memory = pool.memory
    caches = memory.kv_pool_bytes + memory.state_bytes + memory.snapshot_bytes
    assert memory.weights_bytes + memory.activation_bytes + caches <= DEVICE.memory_bytes
    assert caches <= memory_mb * MIB
    assert memory.state_bytes == pool.max_num_seqs * state_mib * MIB * 2
    assert memory.snapshot_bytes == pool.num_snapshots * state_mib * MIB
    assert 256 <= pool.max_model_len <= (pool.num_blocks - 1) * block_size


QWEN = ModelShape(
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    num_layers=28,
    vocab_size=151936,
)
H100_CORES = 132


def step_bytes(shape: ModelShape, max_context: int, prefill_cores: int = H100_CORES) -> int:
    config = Config(scheduler=SchedulerConfig(max_num_seqs=128, max_num_batched_tokens=2048))
    return activation_bytes(
        shape,
        config,
        max_context=max_context,
        kv_bytes_per_token=shape.kv_bytes_per_token(2),
        dtype_bytes=2,
        device_kind="cuda",
        prefill_cores=prefill_cores,
    )


def test_the_plan_is_what_an_h100_took() -> None:
    """bench/results/h100.md: 1.51 GB beside a pool of 17.10 and weights of 1.19."""
    planned = step_bytes(QWEN, 40960)
    assert 1.51e9 < planned < 1.05 * 1.51e9
    copies = 2 * 40960 * QWEN.kv_bytes_per_token(2) // 28 + 2 * SCORES_BYTES
    assert step_bytes(QWEN, 40960, prefill_cores=0) == planned + copies


@pytest.mark.parametrize("cores", [H100_CORES, 0])
def test_what_steps_are_filled_up_to_is_planned(cores: int) -> None:
    """2,100 tokens run as 2,560 on CUDA, and 160 logits as 256."""

    def planned(tokens: int, kind: str, **sizes: int) -> int:
        config = Config(scheduler=SchedulerConfig(max_num_seqs=128, max_num_batched_tokens=tokens))
        return activation_bytes(
            replace(QWEN, **sizes),
            config,
            max_context=4096,
            kv_bytes_per_token=QWEN.kv_bytes_per_token(2),
            dtype_bytes=2,
            device_kind=kind,
            prefill_cores=cores,
        )

    assert planned(2048, "cuda") < planned(2100, "cuda") == planned(2560, "cuda") < planned(2561, "cuda")
    vocab, copies = 1_000_000, LOGITS_COPIES - 1  # large enough to outweigh the layers
    for kind, rows in (("cuda", 256), ("metal", 160), ("cpu", 160)):
        assert planned(256, kind, vocab_size=vocab) == (rows + 160 * copies) * vocab * 4


def test_parts_of_prefill_are_planned_where_they_come_with_most_tokens() -> None:
    """Sixteen heads fill the device with 2,048 tokens, four only in two parts of long contexts."""
    assert step_bytes(QWEN, 1000) == step_bytes(QWEN, 40960)
    few = replace(QWEN, num_heads=4, num_kv_heads=2)
    parts = 2048 * 4 * 2 * (128 + 2) * 4
    assert step_bytes(few, 40960) - step_bytes(few, 1000) == CUDA_LAYERS * parts


def test_the_prefill_kernel_serves_all_layers_or_none() -> None:
    gpu = PagedKernels("cuda", H100_CORES, matrix_units=True)
    model = tiny_model("llama")
    assert prefill_cores(model, SHAPE, gpu) == H100_CORES
    assert prefill_cores(model, SHAPE, PagedKernels("metal", 40)) == 0
    assert prefill_cores(model, SHAPE, None) == 0
    assert prefill_cores(tiny_model("deepseek_v3"), replace(SHAPE, latent_dim=24), gpu) == 0
    assert prefill_cores(tiny_model("llama", head_dim=24), SHAPE, gpu) == 0
    assert prefill_cores(tiny_model("lfm2"), SHAPE, gpu) == 0


def test_the_shape_whatever_the_family_calls_its_fields() -> None:
    gpt = ModelShape.of({"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257, "n_inner": None})
    assert (gpt.hidden_size, gpt.intermediate_size, gpt.head_dim) == (768, 3072, 64)
    assert gpt.kv_bytes_per_token(2) == 2 * 12 * 12 * 64 * 2


def test_latent_attention_holds_queries_of_every_head() -> None:
    facts = {
        "num_attention_heads": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "hidden_size": 64,
        "vocab_size": 100,
    }
    shape = ModelShape.of(facts)
    assert shape.latent_dim == 576

    def bytes_of(shape: ModelShape) -> int:
        config = Config(scheduler=SchedulerConfig(max_num_batched_tokens=256))
        return activation_bytes(shape, config, max_context=4096, kv_bytes_per_token=1024, dtype_bytes=2)

    assert bytes_of(shape) - bytes_of(replace(shape, latent_dim=0)) == 256 * 2 * LATENT_COPIES * 128 * 576
