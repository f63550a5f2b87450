"""Decoders as embedders (Qwen3-Embedding, E5-Mistral and their kind), over mlx-lm's model files.

It does not know pooling. A batch is padded on the right: under causal attention no token sees what follows
it, so padding changes nothing; and because rotary positions are relative, the states are those that other
programs get with padding on the left.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxd.worker.embeddings.attention import WholeSequences
from mlxd.worker.model_facts import context_length
from mlxd.worker.patching import patch_attention

BIDIRECTIONAL_KEY = "use_bidirectional_attention"
UNKNOWN_POSITIONS = 8192
"""For the rare configuration that does not say how long a sequence may be."""
BODY = "model."
"""What mlx-lm's models call all but the projection onto the vocabulary."""


def decoder_classes(model_class: Any, args_class: Any) -> tuple[type[nn.Module], Any]:
    """mlx-lm's (model class, arguments class) as those of an embedder, for mlx-lm's loader.

    The model raises ValueError where it cannot be one.
    """

    class Args:
        def __init__(self, config: dict[str, Any]) -> None:
            self.config = config
            self.of_model = args_class.from_dict(config)

        @classmethod
        def from_dict(cls, config: dict[str, Any]) -> Args:
            return cls(config)

    class Decoder(model_class):
        """The model without its projection onto the vocabulary."""

        num_labels = 0

        def __init__(self, args: Args) -> None:
            super().__init__(args.of_model)
            if args.config.get(BIDIRECTIONAL_KEY):
                raise ValueError("decoders with attention in both directions are not supported as embedders")
            if not callable(getattr(self, "model", None)) or not hasattr(self.model, "layers"):
                raise ValueError(f"the architecture {args.config['model_type']!r} cannot be an embedder")
            self.pop("lm_head", None)
            self.max_positions = context_length(args.config) or UNKNOWN_POSITIONS
            patch_attention(self)

        def states(
            self, token_ids: mx.array, lengths: mx.array | None, token_types: mx.array | None = None
        ) -> mx.array:
            """int32 [B, L], padded on the right -> [B, L, hidden_size], after the model's last norm"""
            return self.model(token_ids, cache=[WholeSequences()] * len(self.model.layers))

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """Checkpoints of embedders often hold the body alone, under names of its own."""
            if not any(name.startswith(BODY) for name in weights):
                weights = {BODY + name: array for name, array in weights.items()}
            if hasattr(super(), "sanitize"):
                weights = super().sanitize(weights)
            return {name: array for name, array in weights.items() if not name.startswith("lm_head.")}

    return Decoder, Args
