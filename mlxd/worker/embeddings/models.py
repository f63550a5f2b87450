"""Which class reads which model type.

It does not know files.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from mlxd.worker.embeddings import bert, modernbert
from mlxd.worker.embeddings.decoder import decoder_classes

BERT_TYPES = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet"})


class EmbeddingModel(Protocol):
    """What the embedder needs of a model."""

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def num_labels(self) -> int:
        """Outputs of its classifier; 0: it has none."""

    def states(
        self, token_ids: mx.array, lengths: mx.array | None, token_types: mx.array | None = None
    ) -> mx.array:
        """int32 [B, L], padded on the right to `lengths` int32 [B] (None: is not) -> [B, L, hidden_size]"""

    def logits(
        self, token_ids: mx.array, lengths: mx.array | None, token_types: mx.array | None = None
    ) -> mx.array:
        """The same -> [B, num_labels]; only where there is a classifier."""


def model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], Any]:
    """(model class, arguments class) for config.json. ValueError: neither ours nor mlx-lm's."""
    kind = config["model_type"]
    if kind in BERT_TYPES:
        return bert.Model, bert.BertArgs
    if kind == "modernbert":
        return modernbert.Model, modernbert.ModernBertArgs
    if bert.num_labels(config):
        raise ValueError(f"Model type {kind} not supported as a cross-encoder.")
    return decoder_classes(*mlx_lm_utils._get_classes(config))


def is_decoder(config: dict[str, Any]) -> bool:
    return config["model_type"] not in BERT_TYPES | {"modernbert"}
