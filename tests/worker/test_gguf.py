"""GGUF -> MLX folder: every weight kept, rotary rows in order, configuration, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx.utils import tree_flatten

from mlxd.config import ModelConfig
from mlxd.errors import ConfigError, WorkerError
from mlxd.step import Progress
from mlxd.worker.gguf import convert, llama3_factors, mlx_name
from mlxd.worker.loader import open_model
from mlxd.worker.model_source import resolve_model
from tests.worker.gguf_writer import Float32Array, Value, write_gguf

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
HEAD_DIM = HIDDEN // HEADS
ALPHABET = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
ALPHABET += [chr(0x100 + n) for n in range(256 - len(ALPHABET))]
TOKENS = ["<|endoftext|>", "<|im_end|>", *ALPHABET, "he", "hel", "Ġa"]


def metadata(**changes: Value) -> dict[str, Value]:
    arch = str(changes.pop("architecture", "llama"))
    values: dict[str, Value] = {
        "general.architecture": arch,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.context_length": 512,
        f"{arch}.rope.freq_base": 100000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(TOKENS) - 2)],
        "tokenizer.ggml.merges": ["h e", "he l", "Ġ a"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    return values | {key.replace("__", "."): value for key, value in changes.items()}


def hf_tensors(rng: np.random.Generator, kind: str) -> dict[str, tuple[str, Float32Array]]:
    """Under GGUF's names, rows in Hugging Face's order."""

    def matrix(rows: int, columns: int) -> tuple[str, Float32Array]:
        return kind, rng.standard_normal((rows, columns)).astype(np.float32)

    def norm() -> tuple[str, Float32Array]:
        return "f32", rng.standard_normal(HIDDEN).astype(np.float32)

    tensors = {"token_embd.weight": ("q8_0", matrix(len(TOKENS), HIDDEN)[1]), "output_norm.weight": norm()}
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }
        tensors |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}.weight": norm() for name in ("attn_norm", "ffn_norm")}
    return tensors


def interleaved(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """llama.cpp's order, row by row: head h's row r goes to 2 r (first half) or 2 r - d + 1 (second half)."""
    head_dim = len(rows) // num_heads
    result = np.empty_like(rows)
    for head in range(num_heads):
        for row in range(head_dim):
            place = 2 * row if row < head_dim // 2 else 2 * (row - head_dim // 2) + 1
            result[head * head_dim + place] = rows[head * head_dim + row]
    return result


def write_model(path: Path, kind: str, **changes: Value) -> dict[str, Float32Array]:
    """A whole model file. Returns what its blocks hold, under GGUF's names, rows in Hugging Face's order."""
    tensors = hf_tensors(np.random.default_rng(1), kind)
    expected = write_gguf(path, metadata(**changes), tensors)
    for name, (tensor_kind, values) in tensors.items():
        num_heads = HEADS if "attn_q." in name else KV_HEADS if "attn_k." in name else 0
        if num_heads:
            tensors[name] = (tensor_kind, interleaved(values, num_heads))
    write_gguf(path, metadata(**changes), tensors)
    return expected


def quiet(progress: Progress) -> None:
    """Nobody watches."""


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0", "q4_1"])
def test_every_weight_is_what_the_file_holds(tmp_path: Path, kind: str) -> None:
    expected = write_model(tmp_path / "m.gguf", kind)
    folder = tmp_path / "out"
    folder.mkdir()
    convert(tmp_path / "m.gguf", folder, quiet)
    skeleton = open_model(folder, ModelConfig(path="m"), "cpu")
    planned = skeleton.weights_bytes()
    loaded = skeleton.load(quiet)
    assert loaded.dtype == mx.float32
    assert planned == loaded.weights_bytes == 4 * sum(values.size for values in expected.values())
    actual = dict(tree_flatten(loaded.model.parameters()))
    assert actual.keys() == {mlx_name(name, "m") for name in expected}
    for name, values in expected.items():
        np.testing.assert_array_equal(np.array(actual[mlx_name(name, "m")]), values, err_msg=name)


def test_the_configuration_says_what_the_metadata_said(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", "q4_1")
    convert(tmp_path / "m.gguf", tmp_path, quiet)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 16)
    assert (config["max_position_embeddings"], config["vocab_size"]) == (512, len(TOKENS))
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_qwen2_keeps_its_row_order_and_biases(tmp_path: Path) -> None:
    tensors = hf_tensors(np.random.default_rng(2), "f32")
    for layer in range(LAYERS):
        for name, rows in (("q", HIDDEN), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
            bias = np.arange(rows, dtype=np.float32)
            tensors[f"blk.{layer}.attn_{name}.bias"] = ("f32", bias)
    write_gguf(tmp_path / "m.gguf", metadata(architecture="qwen2"), tensors)
    convert(tmp_path / "m.gguf", tmp_path, quiet)
    model: Any = open_model(tmp_path, ModelConfig(), "cpu").load(quiet).model
    attention = model.model.layers[1].self_attn
    np.testing.assert_array_equal(np.array(attention.q_proj.weight), tensors["blk.1.attn_q.weight"][1])
    np.testing.assert_array_equal(np.array(attention.k_proj.bias), np.arange(KV_HEADS * HEAD_DIM))


def test_llama_3_rotary_factors_become_the_rule_they_follow(tmp_path: Path) -> None:
    tensors = hf_tensors(np.random.default_rng(3), "f32")
    factors = np.array(llama3_factors(HEAD_DIM, 100000.0, 8.0))
    assert factors[0] == 1.0 and factors[-1] == 8.0
    tensors["rope_freqs.weight"] = ("f32", factors)
    write_gguf(tmp_path / "m.gguf", metadata(), tensors)
    convert(tmp_path / "m.gguf", tmp_path, quiet)
    scaling = json.loads((tmp_path / "config.json").read_text())["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    tensors["rope_freqs.weight"] = ("f32", factors + np.linspace(0, 1, len(factors), dtype=np.float32))
    write_gguf(tmp_path / "m.gguf", metadata(), tensors)
    with pytest.raises(ConfigError, match="rotary factors"):
        convert(tmp_path / "m.gguf", tmp_path, quiet)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "mamba"}, "'mamba'.*llama, qwen2"),
        ({"tokenizer__ggml__model": "bert"}, "'bert'"),
        ({"tokenizer__ggml__pre": "klingon"}, "'klingon'.*smollm"),
        ({"llama__rope__scaling__type": "yarn"}, "'yarn'"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Value], reason: str
) -> None:
    write_gguf(tmp_path / "m.gguf", metadata(**changes), hf_tensors(np.random.default_rng(4), "f32"))
    with pytest.raises(ConfigError, match=reason):
        convert(tmp_path / "m.gguf", tmp_path, quiet)


def test_a_tensor_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    tensors = hf_tensors(np.random.default_rng(5), "f32")
    tensors["blk.0.ffn_gate_exps.weight"] = tensors["blk.0.ffn_gate.weight"]
    write_gguf(tmp_path / "m.gguf", metadata(), tensors)
    with pytest.raises(ConfigError, match=r"m\.gguf.*ffn_gate_exps"):
        convert(tmp_path / "m.gguf", tmp_path, quiet)


def test_no_gguf_file_at_all(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ConfigError, match=r"m\.gguf cannot be read"):
        convert(tmp_path / "m.gguf", tmp_path, quiet)


def test_a_file_is_converted_once_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    options = ModelConfig(path=str(path))
    write_gguf(path, metadata(), {"mystery.weight": ("f32", np.ones((4, HIDDEN), np.float32))})
    with pytest.raises(ConfigError, match="mystery"):
        resolve_model(options, quiet, lambda _: None)
    assert not list((tmp_path / "cache" / "gguf").iterdir())
    write_model(path, "q8_0")
    with pytest.raises(WorkerError, match="not converted yet"):
        resolve_model(options, quiet, lambda _: None, offline=True)
    reports: list[Progress] = []
    announced: list[Path] = []
    folder = resolve_model(options, reports.append, announced.append)
    assert announced == [folder]
    assert [r.done for r in reports if r.stage == "convert"][-1] == reports[-1].total
    before = len(reports)
    assert resolve_model(options, reports.append, announced.append, offline=True) == folder
    assert [report.stage for report in reports[before:]] == ["resolve"]
    assert not list((tmp_path / "cache" / "gguf").glob(".*"))
