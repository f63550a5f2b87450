"""Writes folders of tiny embedding models with random weights, named as checkpoints name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[np.float32]]

SIZE, INNER, LAYERS, VOCAB = 16, 24, 3, 40
_BERT = {
    "hidden_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "max_position_embeddings": 32,
    "vocab_size": VOCAB,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_BERT, "model_type": "bert", "type_vocab_size": 2, "pad_token_id": 0},
    "roberta": {**_BERT, "model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": {**_BERT, "model_type": "xlm-roberta", "type_vocab_size": 1, "pad_token_id": 1},
    "mpnet": {**_BERT, "model_type": "mpnet", "relative_attention_num_buckets": 8},
    "distilbert": {
        "model_type": "distilbert",
        "dim": SIZE,
        "n_layers": LAYERS,
        "n_heads": 4,
        "hidden_dim": INNER,
        "activation": "gelu",
        "max_position_embeddings": 32,
        "vocab_size": VOCAB,
    },
    "modernbert": {
        "model_type": "modernbert",
        "hidden_size": SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": 32,
        "vocab_size": VOCAB,
        "norm_eps": 1e-5,
        "global_attn_every_n_layers": 2,
        "local_attention": 4,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": INNER,
        "max_position_embeddings": 32,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
}
PREFIXES = {"roberta": "roberta.", "xlm-roberta": "roberta.", "modernbert": "model."}
"""Before names in checkpoints of classifiers; others take the model type."""


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the body."""
    kind, square, inner = config["model_type"], (SIZE, SIZE), (INNER, SIZE)
    if kind == "qwen3":
        found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCAB, SIZE), "norm.weight": (SIZE,)}
        for n in range(LAYERS):
            at = f"layers.{n}."
            found |= {
                f"{at}self_attn.{p}_proj.weight": (w, SIZE) for p, w in zip("qkv", (32, 16, 16), strict=True)
            }
            found |= {f"{at}self_attn.{p}_norm.weight": (8,) for p in "qk"}
            found |= {f"{at}self_attn.o_proj.weight": (SIZE, 32), f"{at}mlp.down_proj.weight": (SIZE, INNER)}
            found |= {f"{at}mlp.{p}_proj.weight": inner for p in ("gate", "up")}
            found |= {f"{at}{p}_layernorm.weight": (SIZE,) for p in ("input", "post_attention")}
        return found
    if kind == "modernbert":
        found = {"embeddings.tok_embeddings.weight": (VOCAB, SIZE), "embeddings.norm.weight": (SIZE,)}
        for n in range(LAYERS):
            at = f"layers.{n}."
            found |= {f"{at}attn.Wqkv.weight": (3 * SIZE, SIZE), f"{at}attn.Wo.weight": square}
            found |= {f"{at}mlp.Wi.weight": (2 * INNER, SIZE), f"{at}mlp.Wo.weight": (SIZE, INNER)}
            found |= {f"{at}{p}_norm.weight": (SIZE,) for p in (("attn", "mlp") if n else ("mlp",))}
        return found | {"final_norm.weight": (SIZE,)}
    layer, names = {
        "distilbert": (
            "transformer.layer.{}.",
            "attention.q_lin attention.k_lin attention.v_lin attention.out_lin sa_layer_norm ffn.lin1 "
            "ffn.lin2 output_layer_norm",
        ),
        "mpnet": (
            "encoder.layer.{}.",
            "attention.attn.q attention.attn.k attention.attn.v attention.attn.o attention.LayerNorm "
            "intermediate.dense output.dense output.LayerNorm",
        ),
    }.get(
        kind,
        (
            "encoder.layer.{}.",
            "attention.self.query attention.self.key attention.self.value attention.output.dense "
            "attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm",
        ),
    )
    found = {"embeddings.word_embeddings.weight": (VOCAB, SIZE)}
    found["embeddings.position_embeddings.weight"] = (config["max_position_embeddings"], SIZE)
    if "type_vocab_size" in config:
        found["embeddings.token_type_embeddings.weight"] = (config["type_vocab_size"], SIZE)
    if kind == "mpnet":
        found["encoder.relative_attention_bias.weight"] = (8, 4)
    of_layer = [square] * 4 + [(SIZE,), inner, (SIZE, INNER), (SIZE,)]
    modules = {"embeddings.LayerNorm": (SIZE,)}
    for n in range(LAYERS):
        modules |= {
            layer.format(n) + name: shape for name, shape in zip(names.split(), of_layer, strict=True)
        }
    for name, shape in modules.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def random_weights(wanted: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Numbers of the size that trained ones have; a vector named weight is a norm's, around 1."""
    draw = np.random.default_rng(seed)
    return {
        name: (draw.normal(0, 0.3, shape) + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32)
        for name, shape in wanted.items()
    }


def write_model(folder: Path, config: dict[str, Any], weights: Weights, prefix: str = "") -> None:
    """config.json and model.safetensors, with `prefix` before the names of the body's parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    heads = ("classifier.", "pooler.", "head.", "pre_classifier.")
    arrays = {
        (name if name.startswith(heads) and not name.startswith("pooler.") else prefix + name): mx.array(
            array
        )
        for name, array in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def write_modules(folder: Path, *modules: tuple[str, dict[str, Any]]) -> None:
    """modules.json, and a folder for each module after the transformer: (its kind, its config.json)."""
    kinds = ["Transformer", *(kind for kind, _ in modules)]
    entries = [
        {"idx": n, "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    for entry, (_, config) in zip(entries[1:], modules, strict=True):
        (folder / str(entry["path"])).mkdir()
        (folder / str(entry["path"]) / "config.json").write_text(json.dumps(config))
