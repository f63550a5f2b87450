"""The memory plan: how many KV blocks fit beside the weights and what a step needs.

It does not allocate, and does not know MLX: sizes come in, a plan or a ConfigError with the numbers goes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlxd.config import Config
from mlxd.errors import ConfigError
from mlxd.step import MIN_PROMPT_ROWS, MemoryPlan
from mlxd.worker.kernels.tile import TILE_QUERIES, prefill_splits
from mlxd.worker.platform import Device
from mlxd.worker.step_sizes import ROW_BUCKETS, ROW_STEP, TOKEN_STEP, at_least, common_size, power_of_two

MIB = 1024 * 1024
MIN_POOL_TOKENS = 256
"""less than this is of no use to anybody: the configuration is refused"""
LOGITS_COPIES = 4
"""of float32 [rows, vocabulary] that live at once in sampling: raw, processed, probabilities, a sort"""
HIDDEN_COPIES = 4
"""of [tokens, hidden] that live at once in a layer: normed twice, attention's and the MLP's output. The sums
with the residual take the outputs' places"""
QUERY_COPIES = 4
"""of [tokens, queries of all heads]: projected, turned, attended, and brought back into the step's order"""
KEY_COPIES = 1
"""of keys, and of values: projected"""
LATENT_COPIES = 4
"""of [tokens, heads, latent] that live at once in a layer with latent attention: queries, these beside their
positional parts, outputs, and what is cut out of these"""
MLP_COPIES = 3
CUDA_LAYERS = 16
"""whose intermediate arrays live at once there: MLX keeps them until the device has run what reads them.
Measured on an H100: 1.51 GB at 2,048 tokens of a model where one layer's are 96 MB"""
STATE_LAYERS = 12
"""of which old and new states live at once, also where other arrays do not: states are not freed by the
operations that read them, and MLX runs ahead. 9 to 12 of 16 and 32 (mamba2 on a CPU)"""
MAX_SNAPSHOTS = 1024
"""States that are kept for later requests. Small ones could be many more, but hardly so many conversations go
on at once"""
MAX_GATHERED_TOKENS = 1 << 15
"""that several sequences copy out of the pool for a call on a GPU, unless one sequence has more"""
SCORES_BYTES = 64 * MIB
"""a tile of attention scores (attention/gather.py's MAX_SCORES); alive before and after softmax"""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that a step's memory follows from."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int
    latent_dim: int = 0
    """of latent attention: width of a latent and its positional part; 0: none"""

    @classmethod
    def of(cls, text_config: dict[str, Any]) -> ModelShape:
        """From config.json's text part; families name these fields differently."""

        def first(*keys: str, default: int) -> int:
            values = (text_config.get(key) for key in keys)
            return next((value for value in values if isinstance(value, int) and value > 0), default)

        num_heads = first("num_attention_heads", "n_head", "n_heads", default=32)
        hidden_size = first("hidden_size", "n_embd", "d_model", "dim", default=4096)
        return cls(
            hidden_size=hidden_size,
            intermediate_size=first(
                "intermediate_size", "n_inner", "ffn_dim", "hidden_dim", default=4 * hidden_size
            ),
            num_heads=num_heads,
            num_kv_heads=first("num_key_value_heads", default=num_heads),
            head_dim=first("head_dim", default=max(1, hidden_size // num_heads)),
            num_layers=first("num_hidden_layers", "n_layer", "n_layers", "num_layers", default=32),
            vocab_size=first("vocab_size", default=32000),
            latent_dim=first("kv_lora_rank", default=0) + first("qk_rope_head_dim", default=0),
        )

    def values_per_token(self) -> int:
        """Of a token's arrays that live at once in a layer."""
        return (
            HIDDEN_COPIES * self.hidden_size
            + (QUERY_COPIES * self.num_heads + 2 * KEY_COPIES * self.num_kv_heads) * self.head_dim
            + LATENT_COPIES * self.num_heads * self.latent_dim
            + MLP_COPIES * self.intermediate_size
        )

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """As if every layer kept plain keys and values: the upper estimate for models with other caches."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The plan, and what follows from it for the engine."""

    memory: MemoryPlan
    num_blocks: int
    """NULL_BLOCK included"""
    max_model_len: int
    max_num_seqs: int
    """that have room for their states; as many as are configured where there are none"""
    num_snapshots: int
    """states that can be kept for later requests"""
    warnings: tuple[str, ...]


def activation_bytes(
    shape: ModelShape,
    config: Config,
    *,
    max_context: int,
    kv_bytes_per_token: int,
    dtype_bytes: int,
    device_kind: str = "cpu",
    prefill_cores: int = 0,
) -> int:
    """An upper estimate of what one step holds besides weights and pool.

    MLX frees intermediate arrays as it goes, so about one layer's are alive (more on CUDA), then the logits.
    A chunk's attention copies its sequence out of the pool, on a GPU those of several chunks, and writes
    scores, in tiles of a bounded size. Of these copies one layer's are counted on CUDA too, though the device
    may be that many layers behind: there they are gigabytes that few steps need, and where they do not fit,
    MLX waits for the device (platform.set_memory_limits). The prefill kernel, which runs on `prefill_cores`
    where they are not 0, makes neither. Steps are filled up to sizes that come often: on CUDA all tokens of
    those with chunks, on each GPU the rows that are projected, of which only the first are sampled from.
    `max_context`: the longest sequence that can occur, in tokens.
    """
    scheduler = config.scheduler
    tokens = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max_context)
    if device_kind == "cuda":
        tokens = common_size(tokens, TOKEN_STEP)
    layer = tokens * dtype_bytes * shape.values_per_token()
    beside = 0
    if prefill_cores:
        layer = max(
            min(tokens, count + scheduler.max_num_seqs) * dtype_bytes * shape.values_per_token() + parts
            for count, parts in _prefill_parts(shape, tokens, max_context, prefill_cores)
        )
    else:
        gathered = max_context if device_kind == "cpu" else max(max_context, MAX_GATHERED_TOKENS)
        beside = 2 * gathered * kv_bytes_per_token // shape.num_layers
        beside += 2 * min(SCORES_BYTES, 4 * shape.num_heads * tokens * max_context)
    rows = scheduler.max_num_seqs + MIN_PROMPT_ROWS
    logits = (_filled_rows(rows, device_kind) + rows * (LOGITS_COPIES - 1)) * shape.vocab_size * 4
    return max(live_layers(shape, device_kind) * layer + beside, logits)


def _filled_rows(rows: int, device_kind: str) -> int:
    """That a step projects for as many as are looked at."""
    if device_kind == "cpu":
        return rows
    return power_of_two(rows) if device_kind == "cuda" else at_least(rows, ROW_BUCKETS, ROW_STEP)


def live_layers(shape: ModelShape, device_kind: str) -> int:
    """Layers whose arrays live at once."""
    return min(CUDA_LAYERS, shape.num_layers) if device_kind == "cuda" else 1


def _prefill_parts(
    shape: ModelShape, num_tokens: int, max_context: int, cores: int
) -> Iterator[tuple[int, int]]:
    """Tokens of a step's chunks, up to `num_tokens`, and the bytes of the float32 parts that they attend in:
    none where there are many tokens, because then tiles of whole contexts fill the device."""
    tiles, count = 1, 0
    while count < num_tokens:
        count = min(num_tokens, tiles * TILE_QUERIES)
        splits = prefill_splits(tiles, shape.num_heads, max_context, cores)
        yield count, 4 * count * shape.num_heads * splits * (shape.head_dim + 2) if splits > 1 else 0
        tiles *= 2


def plan_pool(
    config: Config,
    device: Device,
    shape: ModelShape,
    *,
    weights_bytes: int,
    kv_bytes_per_token: int,
    dtype_bytes: int,
    model_context: int | None,
    state_bytes: int = 0,
    prefill_cores: int = 0,
    weights_loaded: bool = True,
) -> PoolPlan:
    """Sizes the pool. ConfigError (with numbers) when it, or the model, does not fit the device.

    The cache is cache.num_blocks, else cache.memory_mb, else cache.memory_percent of the device's memory; cut
    to what weights and activations leave, and to what all requests could ever use. `state_bytes` is what a
    sequence keeps besides its blocks, its recurrent layers' states: of all that run at once they take up to
    half of the cache, or what cache.num_blocks leaves, and fewer run where that is not enough. For those that
    are kept for later requests there is cache.snapshot_percent of it.
    `model_context` is the model's own limit in tokens, None if it has none. `prefill_cores`: of the GPU where
    the prefill kernel serves the model, else 0. `weights_loaded`: whether the weights are already part of
    what the device has in use.
    """
    cache = config.cache
    max_model_len = context_limit(config, model_context)
    block_bytes = kv_bytes_per_token * cache.block_size
    needed = min(MIN_POOL_TOKENS, max_model_len) + cache.block_size
    if cache.num_blocks is not None:
        asked = cache.num_blocks * block_bytes
    elif cache.memory_mb is not None:
        asked = cache.memory_mb * MIB
    else:
        asked = int(cache.memory_percent * device.total_bytes)
    max_context = min(max_model_len, asked // kv_bytes_per_token) if kv_bytes_per_token else max_model_len
    activations = activation_bytes(
        shape,
        config,
        max_context=max_context,
        kv_bytes_per_token=kv_bytes_per_token,
        dtype_bytes=dtype_bytes,
        device_kind=device.kind,
        prefill_cores=prefill_cores,
    )
    room = device.memory_bytes - weights_bytes - activations
    warnings: list[str] = []
    max_num_seqs = config.scheduler.max_num_seqs
    states = _StatePlan(max_num_seqs)
    if state_bytes:
        budget = int(cache.memory_percent * device.total_bytes)
        if cache.memory_mb is not None:
            budget = cache.memory_mb * MIB
        spare = min(asked, room) if cache.num_blocks is None else room - asked
        share, least_pool = None, 0
        if block_bytes and cache.num_blocks is None:
            share, least_pool = spare // 2, -(-needed // cache.block_size) * block_bytes
        told = breakdown(device, weights_bytes, activations)
        states = _plan_states(
            config, device, shape, state_bytes, spare, share, min(budget, spare), least_pool, told
        )
        warnings += states.warnings
        # Also where one runs at a time: warming up runs as many as there may be.
        max_num_seqs = states.max_num_seqs
        taken = states.running_bytes + states.snapshot_bytes
        room -= taken
        if cache.num_blocks is None:
            asked -= taken
    most = 1 + max_num_seqs * -(-max_model_len // cache.block_size)
    if cache.num_blocks is not None:
        num_blocks = cache.num_blocks
        if asked > room:
            raise ConfigError(
                f"cache.num_blocks {num_blocks} takes {mib(asked)}, but "
                f"{breakdown(device, weights_bytes, activations)}"
            )
    else:
        if asked > room and cache.memory_mb is not None:
            warnings.append(
                f"the KV cache gets {mib(max(0, room))} instead of cache.memory_mb {cache.memory_mb}: "
                f"{breakdown(device, weights_bytes, activations)}"
            )
        num_blocks = min(most, min(asked, room) // block_bytes) if block_bytes else most
        if (num_blocks * cache.block_size) < needed:
            raise ConfigError(
                f"the KV cache would hold {max(0, num_blocks - 1) * cache.block_size} tokens, at least "
                f"{needed - cache.block_size} are needed ({mib(block_bytes)} for {cache.block_size} tokens): "
                f"asked for {mib(asked)}, and {breakdown(device, weights_bytes, activations)}"
            )
    pool_bytes = num_blocks * block_bytes
    pool_tokens = (num_blocks - 1) * cache.block_size
    if pool_tokens < max_model_len:
        warnings.append(
            f"requests are limited to {pool_tokens} tokens, not {max_model_len}: the KV cache holds no more"
        )
        max_model_len = pool_tokens
    states_bytes = states.running_bytes + states.snapshot_bytes
    needed_now = pool_bytes + states_bytes + activations + (0 if weights_loaded else weights_bytes)
    if needed_now > device.available_bytes:
        warnings.append(
            f"{mib(needed_now)} are yet to be allocated, but {mib(device.available_bytes)} are free"
        )
    plan = MemoryPlan(
        device_bytes=device.total_bytes,
        weights_bytes=weights_bytes,
        activation_bytes=activations,
        kv_pool_bytes=pool_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        state_bytes=states.running_bytes,
        snapshot_bytes=states.snapshot_bytes,
    )
    return PoolPlan(plan, num_blocks, max_model_len, max_num_seqs, states.num_snapshots, tuple(warnings))


@dataclass(frozen=True, slots=True)
class _StatePlan:
    """How many sequences' states run, and how many are kept beside them."""

    max_num_seqs: int
    num_snapshots: int = 0
    running_bytes: int = 0
    snapshot_bytes: int = 0
    warnings: tuple[str, ...] = ()


def _plan_states(
    config: Config,
    device: Device,
    shape: ModelShape,
    state_bytes: int,
    spare: int,
    share: int | None,
    budget: int,
    least_pool: int,
    told: str,
) -> _StatePlan:
    """`spare` bytes are there for states, of which running ones get `share`, or all but what kept ones get of
    `budget`; these leave `least_pool` bytes. ConfigError, which ends in `told`, when not one sequence can
    run."""
    cache, scheduler = config.cache, config.scheduler
    percent = cache.snapshot_percent if cache.paged and cache.prefix_caching else 0.0
    kept = max(0, int(percent * budget))
    # A step's new states are made beside the old ones, layer after layer.
    ahead = max(live_layers(shape, device.kind), min(STATE_LAYERS, shape.num_layers))
    running_bytes = state_bytes + state_bytes * ahead // shape.num_layers
    if share is None:
        share = spare - kept if spare - kept >= running_bytes else spare
    kept = min(kept, spare - share)
    share = max(0, share)
    running = scheduler.max_num_seqs if scheduler.continuous_batching else 1
    fitting = min(running, share // running_bytes)
    needs = f"the state of a sequence takes {mib(running_bytes)}, and for states there are {mib(share)}"
    if fitting < 1:
        raise ConfigError(f"{needs}: {told}")
    warnings = []
    if fitting < running:
        warnings.append(f"{fitting} sequences run at once, not scheduler.max_num_seqs {running}: {needs}")
    kept = max(0, min(kept, spare - fitting * running_bytes - least_pool))
    num_snapshots = min(MAX_SNAPSHOTS, kept // state_bytes)
    if percent and not num_snapshots:
        warnings.append(
            f"prefixes are not shared: a state where one ends takes {mib(state_bytes)}, and to keep any "
            f"cache.snapshot_percent leaves {mib(kept)}"
        )
    return _StatePlan(
        fitting, num_snapshots, fitting * running_bytes, num_snapshots * state_bytes, tuple(warnings)
    )


def check_weights_fit(device: Device, weights_bytes: int) -> None:
    """Before they are read: ConfigError if the weights alone are more than the device can give."""
    if weights_bytes > device.memory_bytes:
        raise ConfigError(
            f"the model's weights take {mib(weights_bytes)}, but the {device.kind} device has "
            f"{mib(device.memory_bytes)} of usable memory"
        )


def context_limit(config: Config, model_context: int | None) -> int:
    """Tokens a request may hold: the model's limit, cut to model.max_model_len."""
    limits = [limit for limit in (model_context, config.model.max_model_len) if limit is not None]
    if not limits:
        raise ConfigError("the model does not say how long its context is: set model.max_model_len")
    return min(limits)


def breakdown(device: Device, weights_bytes: int, activations: int) -> str:
    return (
        f"of the {mib(device.memory_bytes)} usable on the {device.kind} device the weights take "
        f"{mib(weights_bytes)} and a step up to {mib(activations)}"
    )


def mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
