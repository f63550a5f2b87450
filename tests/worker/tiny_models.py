"""Tiny models with random weights, one for each architecture that the tests go through."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

VOCAB_SIZE = 300

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "mistral": ("llama", {"model_type": "mistral", "tie_word_embeddings": False, "rope_traditional": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-yarn": ("llama", {"rope_scaling": _YARN}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"head_dim": None, "tie_word_embeddings": False}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16.0},
    ),
    "qwen3_moe": ("qwen3_moe", _MOE),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
}
"""Every promise is tested on these: name -> (module of mlx_lm.models, what differs from the common)."""

MORE_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "qwen2_moe",
        {**_MOE, "shared_expert_intermediate_size": 32},
    ),
    "cohere": ("cohere", {"layer_norm_eps": 1e-5, "logit_scale": 0.25}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", _MOE),
    "granite": (
        "granite",
        {
            "logits_scaling": 2.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-5}),
    "stablelm": (
        "stablelm",
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    ),
    "gpt_neox": (
        "gpt_neox",
        {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    ),
    "gpt2": (
        "gpt2",
        {
            "n_ctx": 512,
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 512,
            "layer_norm_epsilon": 1e-5,
        },
    ),
    "phi": ("phi", {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}),
    "internlm2": ("internlm2", {"bias": False}),
    "helium": ("helium", {"attention_bias": False, "mlp_bias": False}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "seed_oss": ("seed_oss", {"attention_bias": False, "attention_out_bias": False}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "ernie4_5": ("ernie4_5", {"use_bias": False}),
    "nemotron": (
        "nemotron",
        {"norm_eps": 1e-5, "hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    ),
}
"""Tested once each, against mlx-lm's tokens."""


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A model in float32. Weights are spread enough for greedy tokens to vary and not to tie."""
    module_name, changes = (ARCHITECTURES | MORE_ARCHITECTURES)[name]
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    config = {"model_type": module_name, **_COMMON, **changes, **overrides}
    model = module.Model(module.ModelArgs.from_dict(config))
    key = mx.random.key(seed)
    weights = []
    for index, (path, weight) in enumerate(tree_flatten(model.parameters())):
        if weight.ndim > 1:
            noise = mx.random.normal(weight.shape, key=mx.random.split(key, index + 1)[index])
            weight = noise * (1.5 / weight.shape[-1] ** 0.5)
        weights.append((path, weight.astype(mx.float32)))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    model.eval()
    return model
