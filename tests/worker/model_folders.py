"""Writes folders of tiny models with random weights, as mlx-lm would have saved them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def write_llama(
    folder: Path, *, bits: int | None = None, dtype: mx.Dtype = mx.float32, **changes: Any
) -> nn.Module:
    """Writes the folder; returns the model in it. `bits`: quantised, in groups of 32."""
    config = LLAMA | changes
    mx.random.seed(7)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return model


def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """mlx-lm's own model without a cache, one whole forward a token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax().item()))
    return tokens[len(prompt) :]
