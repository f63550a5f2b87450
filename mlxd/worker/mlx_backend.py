"""The worker's life with a real model: find, load, plan memory, build the runner, check it, warm it up.

It does not know the socket. Imports MLX, so platform.prepare() must have run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform as host
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

import mlxd
from mlxd.config import Config
from mlxd.step import ModelFiles, Progress, StepPlan, WorkerReady
from mlxd.worker import platform
from mlxd.worker.backend import Send
from mlxd.worker.disk.open import open_disk_tier
from mlxd.worker.disk.tier import DiskTier
from mlxd.worker.identity import weights_digest
from mlxd.worker.kernels.paged import PagedKernels, gpu_kernels
from mlxd.worker.loader import open_model
from mlxd.worker.memory import ModelShape, check_weights_fit, plan_pool
from mlxd.worker.model_facts import context_length, text_config
from mlxd.worker.model_source import resolve_model
from mlxd.worker.runner import PendingStep, Runner, UnsupportedModelError, check_supported, kv_bytes_per_token
from mlxd.worker.step_loop import MemoryUse
from mlxd.worker.support import cache_shapes, layer_shapes

TOKENIZER_FILE = "tokenizer.json"


class MlxBackend:
    """Implements backend.Backend. All of it runs on one thread, save `memory`."""

    def __init__(self, config: Config, send: Send, blas: platform.Blas) -> None:
        self._config = config
        self._send = send
        self._blas = blas
        self._runner: Runner | None = None
        self.disk: DiskTier | None = None

    def load(self) -> WorkerReady:
        config = self._config
        device = platform.detect_device()
        platform.set_memory_limits(device)
        folder = resolve_model(config.model, self._send, self._announce)
        skeleton = open_model(folder, config.model, device.kind)
        if config.cache.paged:
            check_supported(skeleton.model, gpu_kernels(device, skeleton.dtype))
        check_weights_fit(device, skeleton.weights_bytes())
        loaded = skeleton.load(self._send)
        shape = ModelShape.of(text_config(loaded.config))
        kernels = gpu_kernels(device, loaded.dtype) if config.cache.paged else None
        plan = plan_pool(
            config,
            platform.detect_device(),
            shape,
            weights_bytes=loaded.weights_bytes,
            kv_bytes_per_token=token_bytes(loaded.model, shape, loaded.dtype),
            dtype_bytes=loaded.dtype.size,
            model_context=context_length(loaded.config),
            state_bytes=sequence_bytes(loaded.model, loaded.dtype),
            prefill_cores=prefill_cores(loaded.model, shape, kernels),
        )
        self._send(Progress("warmup", 0, 0))
        runner = Runner(
            loaded.model,
            num_blocks=plan.num_blocks,
            block_size=config.cache.block_size,
            max_num_seqs=plan.max_num_seqs,
            dtype=loaded.dtype,
            paged=config.cache.paged,
            tokenizer_file=folder / TOKENIZER_FILE if (folder / TOKENIZER_FILE).is_file() else None,
            kernels=kernels,
            num_snapshots=plan.num_snapshots,
        )
        warnings = [*plan.warnings, *runner.self_check(plan.max_model_len)]
        if config.cache.disk_path is not None and not runner.shares_prefixes:
            warnings.append("cache.disk_path is not used: prefixes of this model are not shared")
        elif config.cache.disk_path is not None and runner.num_snapshots:
            warnings.append("cache.disk_path is not used: this model's states are kept in memory alone")
        elif config.cache.disk_path is not None:
            facts: dict[str, object] = {
                "weights": weights_digest(loaded.model),
                "config": loaded.config,
                "dtype": dtype_name(loaded.dtype),
                "layers": [(s.num_kv_heads, s.key_dim, s.value_dim) for s in layer_shapes(loaded.model)],
                "device": device.kind,
                "attention": runner.attention_name,
                "versions": versions(),
            }
            self.disk, problems = open_disk_tier(
                config.cache, facts, block_bytes=runner.block_bytes, mover=runner, send=self._send
            )
            warnings += problems
        if device.kind == "cpu" and self._blas.problem:
            warnings.append(f"matrix products are slow here: {self._blas.problem}")
        if config.worker.warmup:
            runner.warmup(
                plan.max_model_len,
                config.scheduler.max_num_batched_tokens,
                transfers=self.disk is not None,
            )
        mx.clear_cache()
        mx.reset_peak_memory()
        self._runner = runner
        return WorkerReady(
            pid=os.getpid(),
            model_type=loaded.model_type,
            vocab_size=runner.vocab_size,
            max_model_len=plan.max_model_len,
            num_blocks=plan.num_blocks,
            block_size=config.cache.block_size,
            memory=plan.memory,
            device=str(device),
            attention=runner.attention_name,
            dtype=dtype_name(loaded.dtype),
            versions=versions(),
            warnings=tuple(warnings),
            shares_prefixes=runner.shares_prefixes,
            max_num_seqs=plan.max_num_seqs,
            disk=self.disk.info if self.disk is not None else None,
            num_snapshots=runner.num_snapshots,
        )

    def launch(self, plan: StepPlan) -> PendingStep:
        assert self._runner is not None
        return self._runner.launch(plan)

    def memory(self) -> MemoryUse:
        return MemoryUse(mx.get_active_memory(), mx.get_peak_memory(), mx.get_cache_memory())

    def _announce(self, folder: Path) -> None:
        self._send(ModelFiles(str(folder.resolve())))


def token_bytes(model: nn.Module, shape: ModelShape, dtype: mx.Dtype) -> int:
    """Bytes of cache a token takes; estimated where the model's caches are no plain keys and values."""
    try:
        return kv_bytes_per_token(model, dtype)
    except UnsupportedModelError:
        return shape.kv_bytes_per_token(dtype.size)


def sequence_bytes(model: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes of state that a sequence has besides its tokens' cache; 0 where that is not known."""
    try:
        return cache_shapes(model).state_bytes(dtype)
    except UnsupportedModelError:
        return 0


def prefill_cores(model: nn.Module, shape: ModelShape, kernels: PagedKernels | None) -> int:
    """Of the GPU where all of the model's layers attend by the prefill kernel; 0 where they do not."""
    try:
        caches = cache_shapes(model)
    except UnsupportedModelError:
        return 0
    if kernels is None or caches.states or shape.latent_dim:
        return 0
    return kernels.num_cores if kernels.serves_prefill(caches.layers) else 0


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def versions() -> dict[str, str]:
    """Of everything that decides about results."""
    return {
        "mlxd": mlxd.__version__,
        "python": host.python_version(),
        "mlx": importlib.metadata.version("mlx"),
        "mlx-lm": importlib.metadata.version("mlx-lm"),
    }
