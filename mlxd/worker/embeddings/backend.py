"""The embedding worker's life: find the model, load it, read how it pools, warm it up; then compute batches.

It does not know the socket. Imports MLX, so platform.prepare() must have run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxd.config import EmbeddingsConfig, ModelConfig
from mlxd.errors import ConfigError
from mlxd.step import EmbedBatch, EmbedderReady, EmbedResult, ModelFiles, Progress
from mlxd.worker import platform
from mlxd.worker.backend import Send
from mlxd.worker.embeddings.activations import Activation, activation
from mlxd.worker.embeddings.models import EmbeddingModel, is_decoder, model_classes
from mlxd.worker.embeddings.pooling import Pooler, read_json, read_pooler
from mlxd.worker.loader import Skeleton, open_model
from mlxd.worker.memory import check_weights_fit
from mlxd.worker.mlx_backend import versions
from mlxd.worker.model_cache import Report
from mlxd.worker.model_source import resolve_model
from mlxd.worker.step_loop import MemoryUse

KEY = "embeddings.model"


class EmbeddingBackend:
    """Loads once, then computes batches, all on one thread; `memory` may be asked from any."""

    def __init__(self, config: EmbeddingsConfig, send: Send, blas: platform.Blas) -> None:
        self._config = config
        self._send = send
        self._blas = blas
        self._embedder: Embedder | None = None

    def load(self) -> EmbedderReady:
        config = self._config
        platform.step_back(config.nice)
        device = platform.detect_device()
        platform.set_memory_limits(device)
        folder, skeleton = open_embedding_model(config, device, self._send, self._announce)
        loaded = skeleton.load(self._send)
        embedder = Embedder.of(loaded.model, loaded.config, folder)
        self._send(Progress("warmup", 0, 0))
        size = embedder.warm_up()
        mx.clear_cache()
        self._embedder = embedder
        warnings: tuple[str, ...] = ()
        if device.kind == "cpu" and self._blas.problem:
            warnings = (f"matrix products are slow here: {self._blas.problem}",)
        return EmbedderReady(
            pid=os.getpid(),
            model_type=loaded.model_type,
            vocab_size=int(loaded.config["vocab_size"]),
            max_model_len=longest_input(config, folder, embedder.model),
            size=size,
            is_cross_encoder=embedder.pooler is None,
            device=str(device),
            dtype=str(loaded.dtype).removeprefix("mlx.core."),
            versions=versions(),
            warnings=warnings,
        )

    def run(self, batch: EmbedBatch) -> EmbedResult:
        assert self._embedder is not None
        vectors = self._embedder.compute(batch)
        return EmbedResult(batch.batch_id, vectors.tobytes(), active_memory_bytes=mx.get_active_memory())

    def memory(self) -> MemoryUse:
        return MemoryUse(mx.get_active_memory(), mx.get_peak_memory(), mx.get_cache_memory())

    def _announce(self, folder: Path) -> None:
        self._send(ModelFiles(str(folder.resolve())))


@dataclasses.dataclass(frozen=True, slots=True)
class Embedder:
    """A model, and what becomes of its states: a vector (`pooler`), or a cross-encoder's score."""

    model: EmbeddingModel
    pooler: Pooler | None
    score: Activation

    @classmethod
    def of(cls, model: EmbeddingModel, config: dict[str, Any], folder: Path) -> Embedder:
        """Raises ConfigError for a classifier that gives no score, and what `read_pooler` does."""
        if not model.num_labels:
            return cls(model, read_pooler(folder, is_decoder=is_decoder(config)), lambda x: x)
        if model.num_labels > 1:
            raise ConfigError(
                f"{KEY} is a classifier with {model.num_labels} classes; a cross-encoder has one"
            )
        try:
            return cls(model, None, activation(score_activation(config)))
        except ValueError as error:
            raise ConfigError(f"{KEY}: {error}") from None

    def compute(self, batch: EmbedBatch) -> npt.NDArray[np.float32]:
        """[B, size], C order"""
        lengths = np.frombuffer(batch.lengths, np.int32)
        real = np.arange(lengths.max())[None] < lengths[:, None]
        token_ids = mx.array(padded(real, np.frombuffer(batch.token_ids, np.int32)))
        token_types = None
        if batch.token_types:
            token_types = mx.array(padded(real, np.frombuffer(batch.token_types, np.uint8)))
        row_lengths = mx.array(lengths)
        mask_lengths = None if real.all() else row_lengths
        if self.pooler is None:
            logits = self.model.logits(token_ids, mask_lengths, token_types)
            vectors = self.score(logits.astype(mx.float32))
        else:
            num_prompt_tokens = np.frombuffer(batch.num_prompt_tokens, np.int32)
            prompts = mx.array(num_prompt_tokens) if len(num_prompt_tokens) else mx.zeros_like(row_lengths)
            vectors = self.pooler(
                self.model.states(token_ids, mask_lengths, token_types), row_lengths, prompts
            )
        return np.ascontiguousarray(np.array(vectors, dtype=np.float32))

    def warm_up(self) -> int:
        """Computes one batch; how many numbers a vector has."""
        lengths = np.array([4, 3], np.int32)
        token_ids = np.zeros(lengths.sum(), np.int32)
        return int(self.compute(EmbedBatch(0, lengths.tobytes(), token_ids.tobytes())).shape[1])


def open_embedding_model(
    config: EmbeddingsConfig,
    device: platform.Device,
    report: Report,
    on_small_files: Callable[[Path], None],
    *,
    offline: bool = False,
) -> tuple[Path, Skeleton]:
    """Its folder, and the model whose weights are still to be read and will fit. Raises what `resolve_model`,
    which has the same arguments, and `open_model` do."""
    options = ModelConfig(path=config.model, revision=config.revision, dtype=config.dtype)
    folder = resolve_model(options, report, on_small_files, offline=offline, key=KEY)
    skeleton = with_dtype(open_model(folder, options, device.kind, model_classes), config, device.kind)
    check_weights_fit(device, skeleton.weights_bytes())
    return folder, skeleton


def padded(real: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """int32 like `real`, with `values` where it is true and 0 elsewhere."""
    table = np.zeros(real.shape, np.int32)
    table[real] = values
    return table


def with_dtype(skeleton: Skeleton, config: EmbeddingsConfig, device_kind: str) -> Skeleton:
    """Half precision on GPUs also where the checkpoint is in float32, unless the configuration says."""
    if config.dtype == "auto" and device_kind != "cpu" and skeleton.dtype == mx.float32:
        return dataclasses.replace(skeleton, cast_to=mx.float16)
    return skeleton


def longest_input(config: EmbeddingsConfig, folder: Path, model: EmbeddingModel) -> int:
    """Tokens: what sentence-transformers would cut at, or embeddings.max_model_len, if the model has as many
    positions."""
    own = read_json(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    wanted = config.max_model_len or (own if isinstance(own, int) and own > 0 else model.max_positions)
    return min(wanted, model.max_positions)


def score_activation(config: dict[str, Any]) -> str:
    """What makes a score of a cross-encoder's logit, where sentence-transformers says it; else sigmoid."""
    newer = (config.get("sentence_transformers") or {}).get("activation_fn")
    return str(newer or config.get("sbert_ce_default_activation_function") or "sigmoid")
