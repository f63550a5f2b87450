"""Encoders and Qwen3 in numpy, one sequence at a time, named as in checkpoints: the worker models' twins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, npt.NDArray[Any]]
Config = Mapping[str, Any]


def gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def linear(weights: Weights, name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def layer_norm(weights: Weights, name: str, x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def attention(q: Array, k: Array, v: Array, num_heads: int, bias: Array | float = 0.0) -> Array:
    """[L, heads * dim] each; keys and values may have fewer heads."""
    length = len(q)
    dim = q.shape[1] // num_heads
    q, k, v = (x.reshape(length, -1, dim).transpose(1, 0, 2) for x in (q, k, v))
    k, v = (x.repeat(num_heads // len(x), axis=0) for x in (k, v))
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(dim) + bias
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    return (probabilities @ v).transpose(1, 0, 2).reshape(length, -1)


def rotate(x: Array, num_heads: int, theta: float) -> Array:
    length, dim = len(x), x.shape[1] // num_heads
    angles = np.arange(length)[:, None] * theta ** -(np.arange(0, dim, 2) / dim)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    heads = x.reshape(length, num_heads, dim)
    halves = np.concatenate([-heads[..., dim // 2 :], heads[..., : dim // 2]], -1)
    return (heads * cos + halves * sin).reshape(length, -1)


def bert_states(weights: Weights, config: Config, ids: Sequence[int], types: Sequence[int] = ()) -> Array:
    """BERT, RoBERTa and XLM-RoBERTa, named without the prefix of a task."""
    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]
    first = 0 if config["model_type"] == "bert" else config["pad_token_id"] + 1
    x = weights["embeddings.word_embeddings.weight"][list(ids)].astype(np.float64)
    x = x + weights["embeddings.position_embeddings.weight"][first : first + len(ids)]
    x = x + weights["embeddings.token_type_embeddings.weight"][list(types or [0] * len(ids))]
    x = layer_norm(weights, "embeddings.LayerNorm", x, eps)
    for n in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{n}."
        q, k, v = (linear(weights, f"{at}attention.self.{part}", x) for part in ("query", "key", "value"))
        out = linear(weights, f"{at}attention.output.dense", attention(q, k, v, heads))
        x = layer_norm(weights, f"{at}attention.output.LayerNorm", x + out, eps)
        out = gelu(linear(weights, f"{at}intermediate.dense", x))
        x = layer_norm(weights, f"{at}output.LayerNorm", x + linear(weights, f"{at}output.dense", out), eps)
    return x


def distilbert_states(weights: Weights, config: Config, ids: Sequence[int]) -> Array:
    x = weights["embeddings.word_embeddings.weight"][list(ids)].astype(np.float64)
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm(weights, "embeddings.LayerNorm", x, 1e-12)
    for n in range(config["n_layers"]):
        at = f"transformer.layer.{n}."
        q, k, v = (linear(weights, f"{at}attention.{part}_lin", x) for part in "qkv")
        out = linear(weights, f"{at}attention.out_lin", attention(q, k, v, config["n_heads"]))
        x = layer_norm(weights, f"{at}sa_layer_norm", x + out, 1e-12)
        out = linear(weights, f"{at}ffn.lin2", gelu(linear(weights, f"{at}ffn.lin1", x)))
        x = layer_norm(weights, f"{at}output_layer_norm", x + out, 1e-12)
    return x


def mpnet_bucket(distance: int, num_buckets: int) -> int:
    """T5's rule, number by number."""
    half = num_buckets // 2
    base, distance = (half, distance) if distance > 0 else (0, -distance)
    exact = half // 2
    if distance < exact:
        return base + distance
    step = math.log(distance / exact) / math.log(128 / exact) * (half - exact)
    return base + min(exact + int(step), half - 1)


def mpnet_states(weights: Weights, config: Config, ids: Sequence[int]) -> Array:
    eps, heads, length = config["layer_norm_eps"], config["num_attention_heads"], len(ids)
    x = weights["embeddings.word_embeddings.weight"][list(ids)].astype(np.float64)
    x = x + weights["embeddings.position_embeddings.weight"][2 : 2 + length]
    x = layer_norm(weights, "embeddings.LayerNorm", x, eps)
    table = weights["encoder.relative_attention_bias.weight"]
    buckets = [[mpnet_bucket(key - query, len(table)) for key in range(length)] for query in range(length)]
    bias = table[np.array(buckets)].transpose(2, 0, 1)
    for n in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{n}."
        q, k, v = (linear(weights, f"{at}attention.attn.{part}", x) for part in "qkv")
        out = linear(weights, f"{at}attention.attn.o", attention(q, k, v, heads, bias))
        x = layer_norm(weights, f"{at}attention.LayerNorm", x + out, eps)
        out = linear(weights, f"{at}output.dense", gelu(linear(weights, f"{at}intermediate.dense", x)))
        x = layer_norm(weights, f"{at}output.LayerNorm", x + out, eps)
    return x


def modernbert_states(weights: Weights, config: Config, ids: Sequence[int]) -> Array:
    heads, eps = config["num_attention_heads"], config["norm_eps"]
    x = weights["embeddings.tok_embeddings.weight"][list(ids)].astype(np.float64)
    x = layer_norm(weights, "embeddings.norm", x, eps)
    distance = np.abs(np.arange(len(ids))[:, None] - np.arange(len(ids)))
    for n in range(config["num_hidden_layers"]):
        is_full = n % config["global_attn_every_n_layers"] == 0
        theta = config["global_rope_theta" if is_full else "local_rope_theta"]
        bias = 0.0 if is_full else np.where(distance <= config["local_attention"] // 2, 0.0, -np.inf)
        normed = layer_norm(weights, f"layers.{n}.attn_norm", x, eps) if n else x
        q, k, v = np.split(linear(weights, f"layers.{n}.attn.Wqkv", normed), 3, -1)
        out = attention(rotate(q, heads, theta), rotate(k, heads, theta), v, heads, bias)
        x = x + linear(weights, f"layers.{n}.attn.Wo", out)
        inner, gate = np.split(
            linear(weights, f"layers.{n}.mlp.Wi", layer_norm(weights, f"layers.{n}.mlp_norm", x, eps)), 2, -1
        )
        x = x + linear(weights, f"layers.{n}.mlp.Wo", gelu(inner) * gate)
    return layer_norm(weights, "final_norm", x, eps)


def rms_norm(weights: Weights, name: str, x: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]


def qwen3_states(weights: Weights, config: Config, ids: Sequence[int]) -> Array:
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    heads, kv_heads, dim = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    x = weights["embed_tokens.weight"][list(ids)].astype(np.float64)
    causal = np.where(np.tri(len(ids), dtype=bool), 0.0, -np.inf)

    def normed_heads(name: str, values: Array, count: int) -> Array:
        return rms_norm(weights, name, values.reshape(-1, count, dim), eps).reshape(len(ids), -1)

    for n in range(config["num_hidden_layers"]):
        at = f"layers.{n}."
        normed = rms_norm(weights, f"{at}input_layernorm", x, eps)
        q, k, v = (linear(weights, f"{at}self_attn.{part}_proj", normed) for part in "qkv")
        q = rotate(normed_heads(f"{at}self_attn.q_norm", q, heads), heads, theta)
        k = rotate(normed_heads(f"{at}self_attn.k_norm", k, kv_heads), kv_heads, theta)
        x = x + linear(weights, f"{at}self_attn.o_proj", attention(q, k, v, heads, causal))
        normed = rms_norm(weights, f"{at}post_attention_layernorm", x, eps)
        gate = linear(weights, f"{at}mlp.gate_proj", normed)
        x = x + linear(
            weights,
            f"{at}mlp.down_proj",
            gate / (1 + np.exp(-gate)) * linear(weights, f"{at}mlp.up_proj", normed),
        )
    return rms_norm(weights, "norm", x, eps)


def pooled(states: Array, mode: str, num_prompt_tokens: int = 0) -> Array:
    """As sentence-transformers pools one text's states."""
    real = states[num_prompt_tokens:]
    positions = np.arange(num_prompt_tokens + 1, len(states) + 1)[:, None]
    return {
        "cls": lambda: states[0],
        "max": lambda: real.max(0),
        "mean": lambda: real.mean(0),
        "mean_sqrt_len_tokens": lambda: real.sum(0) / math.sqrt(len(real)),
        "weightedmean": lambda: (real * positions).sum(0) / positions.sum(),
        "lasttoken": lambda: states[-1],
    }[mode]()
