"""Turns a GGUF file of a llama-like model into an ordinary MLX model folder, without changing a weight.

It does not know where the folder is kept or who reads it (loader.py); the tokenizer is gguf_tokenizer.py's.

`mx.load` gives 4-bit and 8-bit GGUF blocks as MLX's own affine quantisation (groups of 32, float16 scales),
and decodes block formats that MLX lacks to float16. What is left to do: the names, the rows of the q and k
projections, which llama.cpp stores in the order of its interleaved rotary embedding, and the JSON files.
Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import cast

import mlx.core as mx

from mlxd.errors import ConfigError
from mlxd.step import Progress
from mlxd.worker.gguf_tokenizer import tokenizer_files
from mlxd.worker.model_cache import Report

GROUP_SIZE = 32

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""general.architecture -> mlx-lm's model_type"""
INTERLEAVED_ROPE = frozenset({"llama"})
"""architectures whose q and k rows llama.cpp permutes"""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<name>\w+)\.(?P<kind>weight|bias|scales|biases)")
ROPE_FREQS = "rope_freqs.weight"

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Metadata:
    """Typed reads from the key-value part, with the architecture's prefix filled in."""

    def __init__(self, values: dict[str, object]) -> None:
        self._values = values
        self.architecture = str(values.get("general.architecture", ""))

    def get(self, key: str) -> object:
        """The raw value (str, list of str, or mx.array), None where absent. `{arch}` is filled in."""
        return self._values.get(key.replace("{arch}", self.architecture))

    def number(self, key: str, default: float | None = None) -> float:
        """A scalar. ConfigError where it is absent and there is no default.

        Rounded to the 7 digits that a float32 holds: 1e-05, not 9.999999747378752e-06.
        """
        value = self.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"the GGUF file has no {key.replace('{arch}', self.architecture)}")
            return default
        assert isinstance(value, mx.array)
        return float(f"{value.item():.7g}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A scalar, exact. ConfigError as for `number`."""
        value = self.get(key)
        return int(cast(int, value.item())) if isinstance(value, mx.array) else int(self.number(key, default))

    def text(self, key: str) -> str | None:
        value = self.get(key)
        return value if isinstance(value, str) else None

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        return value if isinstance(value, list) else []

    def numbers(self, key: str) -> list[float]:
        value = self.get(key)
        return cast("list[float]", value.tolist()) if isinstance(value, mx.array) else []


def convert(path: Path, folder: Path, report: Report) -> None:
    """Writes config.json, model.safetensors, the tokenizer files and the chat template into `folder`."""
    try:
        tensors, values = cast(
            tuple[dict[str, mx.array], dict[str, object]], mx.load(str(path), return_metadata=True)
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be read as a GGUF file: {error}") from None
    metadata = Metadata(values)
    if metadata.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{path.name}: GGUF files of architecture {metadata.architecture!r} are not supported; "
            f"supported are {', '.join(sorted(ARCHITECTURES))} (use the model's MLX or Hugging Face folder)"
        )
    rope_factors = tensors.pop(ROPE_FREQS, None)
    weights: dict[str, mx.array] = {}
    total = len(tensors)
    for done, name in enumerate(sorted(tensors)):
        weights[mlx_name(name, path.name)] = unpermuted(name, tensors.pop(name), metadata)
        if done % 32 == 0:
            report(Progress("convert", done, total, "tensors", path.name))
    config = model_config(metadata, weights, rope_factors)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special_ids(metadata))
    for file_name, content in tokenizer_files(metadata).items():
        if isinstance(content, str):
            (folder / file_name).write_text(content, encoding="utf-8")
        else:
            write_json(folder / file_name, content)
    report(Progress("convert", total, total, "tensors", path.name))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def mlx_name(name: str, file_name: str) -> str:
    """`blk.0.attn_q.scales` -> `model.layers.0.self_attn.q_proj.scales`."""
    match = TENSOR_NAME.fullmatch(name)
    if match is None or match["name"] not in NAMES:
        raise ConfigError(f"{file_name} holds the tensor {name}, which mlxd cannot convert")
    layer = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{layer}{NAMES[match['name']]}.{match['kind']}"


def unpermuted(name: str, tensor: mx.array, metadata: Metadata) -> mx.array:
    """Rows of q and k back in the order of the half-split rotary embedding; other tensors as they are.

    Within each head llama.cpp stores rows 0, h/2, 1, h/2 + 1, …; a packed row moves whole, so quantised
    weights, scales and biases move alike.
    """
    if metadata.architecture not in INTERLEAVED_ROPE:
        return tensor
    if ".attn_q." in name:
        num_heads = metadata.integer("{arch}.attention.head_count")
    elif ".attn_k." in name:
        num_heads = num_kv_heads(metadata)
    else:
        return tensor
    rows, *rest = tensor.shape
    pairs = tensor.reshape(num_heads, rows // num_heads // 2, 2, *rest)
    return mx.contiguous(pairs.swapaxes(1, 2).reshape(rows, *rest))


def num_kv_heads(metadata: Metadata) -> int:
    return metadata.integer("{arch}.attention.head_count_kv", metadata.integer("{arch}.attention.head_count"))


def model_config(
    metadata: Metadata, weights: dict[str, mx.array], rope_factors: mx.array | None
) -> dict[str, object]:
    """config.json as mlx-lm reads it."""
    hidden_size = metadata.integer("{arch}.embedding_length")
    num_heads = metadata.integer("{arch}.attention.head_count")
    head_dim = metadata.integer("{arch}.attention.key_length", hidden_size // num_heads)
    theta = metadata.number("{arch}.rope.freq_base", 10000.0)
    embedding = weights["model.embed_tokens.weight"]
    model_type = ARCHITECTURES[metadata.architecture]
    config: dict[str, object] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_hidden_layers": metadata.integer("{arch}.block_count"),
        "intermediate_size": metadata.integer("{arch}.feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads(metadata),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number("{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "max_position_embeddings": metadata.integer("{arch}.context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in weights,
        "torch_dtype": "float16",
        **special_ids(metadata),
    }
    if scaling := rope_scaling(metadata, rope_factors, head_dim, theta):
        config["rope_scaling"] = scaling
    if quantization := quantization_section(weights):
        config["quantization"] = quantization
    return config


def special_ids(metadata: Metadata) -> dict[str, int]:
    """{"bos_token_id": …, "eos_token_id": …} as far as the file says."""
    ids = {key: metadata.integer(f"tokenizer.ggml.{key}", -1) for key in ("bos_token_id", "eos_token_id")}
    return {key: token_id for key, token_id in ids.items() if token_id >= 0}


def quantization_section(weights: dict[str, mx.array]) -> dict[str, object]:
    """Bits of each quantised module; 32 * packed words / (32 * groups) = words a group. Empty if none is."""
    bits = {
        name.removesuffix(".scales"): weights[name.replace(".scales", ".weight")].shape[-1]
        // scales.shape[-1]
        for name, scales in weights.items()
        if name.endswith(".scales")
    }
    if not bits:
        return {}
    usual = max(set(bits.values()), key=list(bits.values()).count)
    section: dict[str, object] = {"group_size": GROUP_SIZE, "bits": usual}
    section.update({n: {"group_size": GROUP_SIZE, "bits": b} for n, b in bits.items() if b != usual})
    return section


def rope_scaling(
    metadata: Metadata, factors: mx.array | None, head_dim: int, theta: float
) -> dict[str, object] | None:
    """The rotary scaling in Hugging Face's words; ConfigError where that cannot be exact."""
    kind = metadata.text("{arch}.rope.scaling.type")
    if factors is not None:
        # Llama 3.1 files hold the factors themselves; mlx-lm takes the rule they come from.
        factor = round(cast(float, factors.max().item()), 4)
        expected = llama3_factors(head_dim, theta, factor)
        if not mx.allclose(factors, expected, rtol=1e-3).item():
            raise ConfigError("the GGUF file's rotary factors follow no rule that mlxd knows")
        return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number("{arch}.rope.scaling.factor")}
    raise ConfigError(f"GGUF files with {kind!r} rotary scaling are not supported")


def llama3_factors(head_dim: int, theta: float, factor: float) -> mx.array:
    """float32 [head_dim / 2]: by what each frequency is divided (Llama 3.1's rule)."""
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    original = LLAMA3_ROPE["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return mx.array(factors, dtype=mx.float32)
