"""ModernBERT, with its classifier.

It does not know pooling or tokens' texts. Source: Warner et al. 2024: no positions but rotary ones, gated
feed-forward blocks, normalisation before each block, and attention to a window in two layers of three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxd.worker.embeddings.activations import activation
from mlxd.worker.embeddings.attention import attend
from mlxd.worker.embeddings.bert import num_labels

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_THETAS = {FULL: 160000.0, SLIDING: 10000.0}
OLD_THETA_KEYS = {FULL: "global_rope_theta", SLIDING: "local_rope_theta"}


@dataclass(frozen=True, slots=True)
class ModernBertArgs:
    """What config.json says, in its old form and in that of transformers 5."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    rope_thetas: dict[str, float]
    window: int
    """how many tokens before and after itself a token sees in a sliding layer"""
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_activation: str
    classifier_bias: bool
    classifier_activation: str
    classifier_pooling: Literal["cls", "mean"]
    num_labels: int

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModernBertArgs:
        """ValueError for variants that are not supported; KeyError for what must be there."""
        every = config.get("global_attn_every_n_layers", 3)
        types = config.get("layer_types") or [
            SLIDING if layer % every else FULL for layer in range(config["num_hidden_layers"])
        ]
        thetas = {}
        for kind in (FULL, SLIDING):
            rope = (config.get("rope_parameters") or {}).get(kind) or {}
            if rope.get("rope_type", "default") != "default":
                raise ValueError(f"rotary positions of type {rope['rope_type']!r} are not supported")
            thetas[kind] = rope.get("rope_theta") or config.get(OLD_THETA_KEYS[kind]) or DEFAULT_THETAS[kind]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            intermediate_size=config["intermediate_size"],
            max_position_embeddings=config["max_position_embeddings"],
            layer_types=tuple(types),
            rope_thetas=thetas,
            window=config.get("local_attention", 128) // 2,
            norm_eps=config.get("norm_eps", 1e-5),
            norm_bias=config.get("norm_bias", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            hidden_activation=config.get("hidden_activation", "gelu"),
            classifier_bias=config.get("classifier_bias", False),
            classifier_activation=config.get("classifier_activation", "gelu"),
            classifier_pooling=config.get("classifier_pooling", "cls"),
            num_labels=num_labels(config),
        )


class Embeddings(nn.Module):
    def __init__(self, args: ModernBertArgs) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.norm = nn.LayerNorm(args.hidden_size, args.norm_eps, bias=args.norm_bias)

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self.norm(self.tok_embeddings(token_ids))


class Attention(nn.Module):
    def __init__(self, args: ModernBertArgs, kind: str) -> None:
        super().__init__()
        size, self._num_heads = args.hidden_size, args.num_attention_heads
        self.Wqkv = nn.Linear(size, 3 * size, bias=args.attention_bias)
        self.Wo = nn.Linear(size, size, bias=args.attention_bias)
        self._head_dim = size // args.num_attention_heads
        self._theta = args.rope_thetas[kind]

    def __call__(self, hidden: mx.array, mask: mx.array | None) -> mx.array:
        num_rows, length, size = hidden.shape
        projected = self.Wqkv(hidden).reshape(num_rows, length, 3, self._num_heads, self._head_dim)
        queries, keys, values = projected.transpose(2, 0, 3, 1, 4)
        attended = attend(
            self._rotate(queries), self._rotate(keys), values, scale=self._head_dim**-0.5, mask=mask
        )
        return self.Wo(attended.transpose(0, 2, 1, 3).reshape(num_rows, length, size))

    def _rotate(self, heads: mx.array) -> mx.array:
        return mx.fast.rope(heads, self._head_dim, traditional=False, base=self._theta, scale=1.0, offset=0)


class FeedForward(nn.Module):
    def __init__(self, args: ModernBertArgs) -> None:
        super().__init__()
        self.Wi = nn.Linear(args.hidden_size, 2 * args.intermediate_size, bias=args.mlp_bias)
        self.Wo = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)
        self._activation = activation(args.hidden_activation)

    def __call__(self, hidden: mx.array) -> mx.array:
        inner, gate = mx.split(self.Wi(hidden), 2, axis=-1)
        return self.Wo(self._activation(inner) * gate)


class Layer(nn.Module):
    """The first layer's input is normalised already, by the embeddings."""

    def __init__(self, args: ModernBertArgs, index: int) -> None:
        super().__init__()
        self.kind = args.layer_types[index]
        if index:
            self.attn_norm = nn.LayerNorm(args.hidden_size, args.norm_eps, bias=args.norm_bias)
        self.attn = Attention(args, self.kind)
        self.mlp_norm = nn.LayerNorm(args.hidden_size, args.norm_eps, bias=args.norm_bias)
        self.mlp = FeedForward(args)

    def __call__(self, hidden: mx.array, mask: mx.array | None) -> mx.array:
        normed = self.attn_norm(hidden) if "attn_norm" in self else hidden
        hidden = hidden + self.attn(normed, mask)
        return hidden + self.mlp(self.mlp_norm(hidden))


class Head(nn.Module):
    def __init__(self, args: ModernBertArgs) -> None:
        super().__init__()
        self.dense = nn.Linear(args.hidden_size, args.hidden_size, bias=args.classifier_bias)
        self.norm = nn.LayerNorm(args.hidden_size, args.norm_eps, bias=args.norm_bias)
        self._activation = activation(args.classifier_activation)

    def __call__(self, pooled: mx.array) -> mx.array:
        return self.norm(self._activation(self.dense(pooled)))


class Model(nn.Module):
    """Token states, or a classifier's logits."""

    def __init__(self, args: ModernBertArgs) -> None:
        super().__init__()
        self.embeddings = Embeddings(args)
        self.layers = [Layer(args, index) for index in range(len(args.layer_types))]
        self.final_norm = nn.LayerNorm(args.hidden_size, args.norm_eps, bias=args.norm_bias)
        if args.num_labels:
            self.head = Head(args)
            self.classifier = nn.Linear(args.hidden_size, args.num_labels)
        self._args = args

    @property
    def max_positions(self) -> int:
        return self._args.max_position_embeddings

    @property
    def num_labels(self) -> int:
        return self._args.num_labels

    def states(
        self, token_ids: mx.array, lengths: mx.array | None, token_types: mx.array | None = None
    ) -> mx.array:
        """int32 [B, L], padded on the right to `lengths` int32 [B] (None: is not) -> [B, L, hidden_size]

        There are no token types: they are not looked at.
        """
        length = token_ids.shape[1]
        positions = mx.arange(length)
        full = None if lengths is None else (positions[None] < lengths[:, None])[:, None, None]
        masks = {FULL: full, SLIDING: full}
        if length > self._args.window + 1:
            near = mx.abs(positions[:, None] - positions[None]) <= self._args.window
            masks[SLIDING] = near[None, None] if full is None else near & full
        hidden = self.embeddings(token_ids)
        for layer in self.layers:
            hidden = layer(hidden, masks[layer.kind])
        return self.final_norm(hidden)

    def logits(
        self, token_ids: mx.array, lengths: mx.array | None, token_types: mx.array | None = None
    ) -> mx.array:
        """The same -> [B, num_labels]"""
        states = self.states(token_ids, lengths)
        if self._args.classifier_pooling == "cls":
            pooled = states[:, 0]
        elif lengths is None:
            pooled = states.mean(axis=1)
        else:
            real = (mx.arange(states.shape[1])[None] < lengths[:, None])[..., None]
            pooled = (states * real).sum(axis=1) / lengths[:, None].astype(states.dtype)
        return self.classifier(self.head(pooled))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Checkpoints' names to ours; without what is not needed."""
        heads = ("head.", "classifier.") if self._args.num_labels else ()
        wanted = ("embeddings.", "layers.", "final_norm.", *heads)
        renamed = {name.removeprefix("model."): array for name, array in weights.items()}
        return {name: array for name, array in renamed.items() if name.startswith(wanted)}
