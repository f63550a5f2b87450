"""BERT and its family: RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and MPNet, with their classifiers.

It does not know pooling or tokens' texts. Sources: Devlin et al. 2018 (BERT), Liu et al. 2019 (RoBERTa:
learned positions that begin after the padding id), Sanh et al. 2019 (DistilBERT: no token types), Song et al.
2020 (MPNet: a bias for relative positions, as in T5).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxd.worker.embeddings.activations import activation
from mlxd.worker.embeddings.attention import attend

OFFSET_TYPES = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
"""Model types whose positions begin after the padding id."""
MAX_DISTANCE = 128
"""MPNet: all distances from here on share the last bucket."""

NAMES = (
    (r"^(bert|roberta|distilbert|mpnet)\.", ""),
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    (r"^(encoder|transformer)\.layers?\.", "layers."),
    (r"^encoder\.relative_attention_bias\.", "relative_attention_bias."),
    (r"\.attention\.(self|attn)\.", "."),
    (r"\.attention\.(q|k|v|out)_lin\.", r".\1."),
    (r"\.query\.", ".q."),
    (r"\.key\.", ".k."),
    (r"\.value\.", ".v."),
    (r"\.attention\.output\.dense\.", ".o."),
    (r"\.out\.", ".o."),
    (r"\.attention\.(output\.)?LayerNorm\.", ".attention_norm."),
    (r"\.sa_layer_norm\.", ".attention_norm."),
    (r"\.(intermediate\.dense|ffn\.lin1)\.", ".up."),
    (r"\.(output\.dense|ffn\.lin2)\.", ".down."),
    (r"\.(output\.LayerNorm|output_layer_norm)\.", ".output_norm."),
    (r"^embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"^pooler\.dense\.", "pooler."),
    (r"^(classifier\.dense|pre_classifier)\.", "pooler."),
    (r"^classifier\.out_proj\.", "classifier."),
)
"""What checkpoints call parameters -> what they are called here, one after another."""
UNUSED = re.compile(r"position_ids$|^(cls|lm_head|qa_outputs|vocab_\w+)\.")
"""Heads of other tasks."""


@dataclass(frozen=True, slots=True)
class BertArgs:
    """What config.json says, under BERT's names. `num_labels` 0: no classifier, token states."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    pad_token_id: int
    num_buckets: int
    num_labels: int

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> BertArgs:
        """ValueError for variants that are none of these; KeyError for what must be there."""
        kind = config["model_type"]
        if config.get("position_embedding_type") not in (None, "absolute"):
            raise ValueError(f"positions of type {config['position_embedding_type']!r} are not supported")
        distil = kind == "distilbert"
        return cls(
            model_type=kind,
            vocab_size=config["vocab_size"],
            hidden_size=config["dim" if distil else "hidden_size"],
            num_hidden_layers=config["n_layers" if distil else "num_hidden_layers"],
            num_attention_heads=config["n_heads" if distil else "num_attention_heads"],
            intermediate_size=config["hidden_dim" if distil else "intermediate_size"],
            max_position_embeddings=config["max_position_embeddings"],
            type_vocab_size=0 if kind in ("distilbert", "mpnet") else config.get("type_vocab_size", 2),
            layer_norm_eps=config.get("layer_norm_eps", 1e-12),
            hidden_act=config.get("activation" if distil else "hidden_act", "gelu"),
            pad_token_id=1 if kind == "mpnet" else config.get("pad_token_id") or 0,
            num_buckets=config.get("relative_attention_num_buckets", 32) if kind == "mpnet" else 0,
            num_labels=num_labels(config),
        )

    @property
    def position_offset(self) -> int:
        """The position of the first token."""
        return self.pad_token_id + 1 if self.model_type in OFFSET_TYPES else 0


def num_labels(config: dict[str, Any]) -> int:
    """Outputs of the classifier that a checkpoint has; 0 where it has none."""
    if not any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return 0
    labels = config.get("id2label")
    return len(labels) if labels else int(config.get("num_labels", 2))


class Embeddings(nn.Module):
    """Words, positions and token types, added and normalised."""

    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.position_embeddings = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        if args.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(args.type_vocab_size, args.hidden_size)
        self.norm = nn.LayerNorm(args.hidden_size, args.layer_norm_eps)
        self._offset = args.position_offset
        self._num_types = args.type_vocab_size

    def __call__(self, token_ids: mx.array, token_types: mx.array | None) -> mx.array:
        positions = mx.arange(token_ids.shape[1]) + self._offset
        hidden = self.word_embeddings(token_ids) + self.position_embeddings(positions)
        if self._num_types:
            # RoBERTa has one type only, whichever text of a pair a token belongs to.
            types = mx.array(0) if token_types is None or self._num_types == 1 else token_types
            hidden = hidden + self.token_type_embeddings(types)
        return self.norm(hidden)


class Layer(nn.Module):
    """Attention and a feed-forward block, each added to its input and then normalised."""

    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        size = args.hidden_size
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.o = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, args.layer_norm_eps)
        self.up = nn.Linear(size, args.intermediate_size)
        self.down = nn.Linear(args.intermediate_size, size)
        self.output_norm = nn.LayerNorm(size, args.layer_norm_eps)
        self._num_heads = args.num_attention_heads
        self._scale = (size // args.num_attention_heads) ** -0.5
        self._activation = activation(args.hidden_act)

    def __call__(self, hidden: mx.array, mask: mx.array | None) -> mx.array:
        num_rows, length, size = hidden.shape

        def heads(projected: mx.array) -> mx.array:
            return projected.reshape(num_rows, length, self._num_heads, -1).transpose(0, 2, 1, 3)

        attended = attend(
            heads(self.q(hidden)), heads(self.k(hidden)), heads(self.v(hidden)), scale=self._scale, mask=mask
        )
        attended = attended.transpose(0, 2, 1, 3).reshape(num_rows, length, size)
        hidden = self.attention_norm(hidden + self.o(attended))
        return self.output_norm(hidden + self.down(self._activation(self.up(hidden))))


class Model(nn.Module):
    """Token states, or a classifier's logits."""

    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self.embeddings = Embeddings(args)
        self.layers = [Layer(args) for _ in range(args.num_hidden_layers)]
        if args.num_buckets:
            self.relative_attention_bias = nn.Embedding(args.num_buckets, args.num_attention_heads)
        if args.num_labels:
            self.pooler = nn.Linear(args.hidden_size, args.hidden_size)
            self.classifier = nn.Linear(args.hidden_size, args.num_labels)
        self._args = args

    @property
    def max_positions(self) -> int:
        return self._args.max_position_embeddings - self._args.position_offset

    @property
    def num_labels(self) -> int:
        return self._args.num_labels

    def states(
        self, token_ids: mx.array, lengths: mx.array | None, token_types: mx.array | None = None
    ) -> mx.array:
        """int32 [B, L], padded on the right to `lengths` int32 [B] (None: is not) -> [B, L, hidden_size]"""
        length = token_ids.shape[1]
        hidden = self.embeddings(token_ids, token_types)
        mask = None if lengths is None else (mx.arange(length)[None] < lengths[:, None])[:, None, None]
        if self._args.num_buckets:
            bias = self._position_bias(length).astype(hidden.dtype)
            mask = bias if mask is None else mx.where(mask, bias, mx.finfo(hidden.dtype).min)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden

    def logits(
        self, token_ids: mx.array, lengths: mx.array | None, token_types: mx.array | None = None
    ) -> mx.array:
        """The same -> [B, num_labels], from the state of the first token."""
        first = self.pooler(self.states(token_ids, lengths, token_types)[:, 0])
        squeeze = nn.relu if self._args.model_type == "distilbert" else mx.tanh
        return self.classifier(squeeze(first))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Checkpoints' names to ours; without what is not needed."""
        renamed = {}
        for name, array in weights.items():
            for pattern, replacement in NAMES:
                name = re.sub(pattern, replacement, name)
            is_head = name.startswith(("pooler.", "classifier."))
            if not UNUSED.search(name) and (self._args.num_labels or not is_head):
                renamed[name] = array
        return renamed

    def _position_bias(self, length: int) -> mx.array:
        """[1, num_heads, length, length]"""
        buckets = mx.array(relative_buckets(length, self._args.num_buckets))
        return self.relative_attention_bias(buckets).transpose(2, 0, 1)[None]


def relative_buckets(length: int, num_buckets: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """int32 [length, length]: the bucket of key k seen from query q (T5, section 2.1: half of the buckets for
    each direction, of these half for single distances and half for logarithmically growing ranges)."""
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    magnitude = np.abs(distance)
    growth = np.log(np.maximum(magnitude, 1) / exact) / math.log(MAX_DISTANCE / exact)
    far = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    return (np.where(distance > 0, half, 0) + np.where(magnitude < exact, magnitude, far)).astype(np.int32)
