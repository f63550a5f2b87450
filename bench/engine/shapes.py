"""Models of real shapes with random weights, for machines where no weights are to be had.

It does not know what is measured. Speed does not depend on the weights' values.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-3B": {
        "model_type": "llama",
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Qwen3.5-small": {
        "model_type": "qwen3_5",
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "full_attention_interval": 4,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_value_heads": 6,
        "linear_num_key_heads": 6,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": 50000,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "vocab_size": 50000,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "tiny-recurrent": {
        "model_type": "qwen3_5",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": 50000,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}
"""config.json of each; the tiny ones are for trying the benchmarks out on a CPU, Qwen3.5-small is a model
with recurrent state that two cores run"""


def build(name: str, dtype: mx.Dtype) -> nn.Module:
    """The model, evaluated. Weights are the same every time."""
    config = SHAPES[name]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    model.eval()
    return model


def weights_bytes(model: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def write_folder(folder: Path, name: str, dtype: mx.Dtype, tokenizer: Path) -> None:
    """A model folder for servers. `tokenizer`: the folder of a model whose tokenizer is taken.

    Where the shape's vocabulary is larger, made-up words fill it, so that every token that random weights
    choose has a text. No token ends an answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name] | {"torch_dtype": str(dtype).removeprefix("mlx.core.")}
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer.iterdir():
        if path.name in ("tokenizer_config.json", "chat_template.jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    described = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = described["model"]["vocab"]
    used = {*vocabulary.values(), *(token["id"] for token in described["added_tokens"])}
    vocabulary |= {f"Ġw{id_}": id_ for id_ in range(config["vocab_size"]) if id_ not in used}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    arrays = dict(tree_flatten(build(name, dtype).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
