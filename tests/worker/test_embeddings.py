"""Embedding models against numpy: architectures, pooling, dense layers, cross-encoders, and MiniLM itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from mlxd.config import EmbeddingsConfig
from mlxd.errors import ConfigError
from mlxd.step import EmbedBatch, Message, ModelFiles, Progress
from mlxd.worker import platform
from mlxd.worker.attention import tiles
from mlxd.worker.demo_model import MINILM, fetch_demo_model
from mlxd.worker.embeddings import attention
from mlxd.worker.embeddings.activations import activation, gelu
from mlxd.worker.embeddings.backend import EmbeddingBackend
from mlxd.worker.embeddings.pooling import MODES
from mlxd.worker.platform import Blas
from tests.reference import encoders
from tests.worker.embedding_folders import (
    CONFIGS,
    PREFIXES,
    SIZE,
    VOCAB,
    Weights,
    random_weights,
    shapes,
    write_model,
    write_modules,
)

TEXTS = [[5, 9, 2, 30, 7, 7, 1, 12, 3], [4, 4, 8, 2, 6], [11]]
"""Token ids, the longest first; more than ModernBERT's window, and one alone."""
STATES: dict[str, Callable[..., npt.NDArray[np.float64]]] = {
    "bert": encoders.bert_states,
    "roberta": encoders.bert_states,
    "xlm-roberta": encoders.bert_states,
    "distilbert": encoders.distilbert_states,
    "mpnet": encoders.mpnet_states,
    "modernbert": encoders.modernbert_states,
    "qwen3": encoders.qwen3_states,
}


@pytest.fixture(autouse=True)
def own_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend steps back for others; the tests must not."""
    monkeypatch.setattr(platform, "step_back", lambda nice: None)


def load(folder: Path, sent: list[Message] | None = None, **options: Any) -> EmbeddingBackend:
    messages = [] if sent is None else sent
    config = EmbeddingsConfig(model=str(folder), **options)
    backend = EmbeddingBackend(config, messages.append, Blas("none", 1))
    messages.append(backend.load())
    return backend


def run(
    backend: EmbeddingBackend,
    texts: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]] = (),
    prompts: Sequence[int] = (),
) -> npt.NDArray[np.float32]:
    def packed(values: Sequence[int], dtype: Any) -> bytes:
        return np.array(values, dtype).tobytes()

    batch = EmbedBatch(
        1,
        packed([len(text) for text in texts], np.int32),
        packed([token for text in texts for token in text], np.int32),
        num_prompt_tokens=packed(prompts, np.int32),
        token_types=packed([kind for row in types for kind in row], np.uint8),
    )
    return np.frombuffer(backend.run(batch).vectors, np.float32).reshape(len(texts), -1)


def unit(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("kind", sorted(STATES))
def test_vectors_are_those_of_numpy_alone_and_in_a_batch(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    weights = random_weights(shapes(config))
    write_model(tmp_path, config, weights)
    sent: list[Message] = []
    backend = load(tmp_path, sent)
    mode = "lasttoken" if kind == "qwen3" else "mean"
    expected = [unit(encoders.pooled(STATES[kind](weights, config, text), mode)) for text in TEXTS]
    np.testing.assert_allclose(run(backend, TEXTS), expected, atol=2e-5)
    for text, vector in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(run(backend, [text])[0], vector, atol=2e-5)
    assert [type(message) for message in sent[:2]] == [Progress, ModelFiles]
    info = sent[-1]
    offset = 2 if kind in ("roberta", "xlm-roberta", "mpnet") else 0
    assert (info.size, info.vocab_size, info.max_model_len) == (SIZE, VOCAB, 32 - offset)  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["body", "whole", "untied"])
def test_decoders_come_with_and_without_their_prefix_and_projection(form: str, tmp_path: Path) -> None:
    config = {**CONFIGS["qwen3"], "tie_word_embeddings": form != "untied"}
    weights = random_weights(shapes(config))
    stored = weights if form == "body" else {f"model.{name}": array for name, array in weights.items()}
    extra: Weights = {"lm_head.weight": np.zeros((VOCAB, SIZE), np.float32)} if form == "untied" else {}
    write_model(tmp_path, config, stored | extra)
    expected = unit(encoders.qwen3_states(weights, config, TEXTS[0])[-1])
    np.testing.assert_allclose(run(load(tmp_path), TEXTS)[0], expected, atol=2e-5)


def test_long_sequences_are_attended_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("bert", "modernbert", "mpnet", "qwen3"):
        config = CONFIGS[kind]
        write_model(tmp_path / kind, config, random_weights(shapes(config)))
        backend = load(tmp_path / kind)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "in_cache", lambda queries: False)
            whole = run(backend, TEXTS)
            patch.setattr(attention, "MAX_SCORES", 2 * len(TEXTS) * 4 * len(TEXTS[0]))
            np.testing.assert_allclose(run(backend, TEXTS), whole, atol=1e-6)
        np.testing.assert_allclose(run(backend, TEXTS), whole, atol=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "MIN_TILE", 2)
            for scores_in_cache in (1, 2 * 4 * len(TEXTS[0]) ** 2):
                patch.setattr(tiles, "CACHED_SCORES", scores_in_cache)
                np.testing.assert_allclose(run(backend, TEXTS), whole, atol=1e-6)


def test_a_decoders_window_is_kept() -> None:
    caches = attention.WholeSequences()
    assert caches.make_mask(1) is None and caches.make_mask(5, window_size=5) == "causal"
    mask = np.array(caches.make_mask(5, window_size=2))
    assert mask.tolist() == [[0 <= q - k < 2 for k in range(5)] for q in range(5)]


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), ("lasttoken", "max", "cls")])
def test_pooling(modes: tuple[str, ...], tmp_path: Path) -> None:
    config, prompts = CONFIGS["bert"], [3, 2, 0]
    weights = random_weights(shapes(config))
    write_model(tmp_path, config, weights)
    write_modules(
        tmp_path, ("Pooling", {"pooling_mode": list(modes), "include_prompt": False}), ("Dropout", {})
    )
    ordered = [mode for mode in MODES if mode in modes]
    expected = [
        np.concatenate(
            [encoders.pooled(encoders.bert_states(weights, config, text), mode, n) for mode in ordered]
        )
        for text, n in zip(TEXTS, prompts, strict=True)
    ]
    np.testing.assert_allclose(run(load(tmp_path), TEXTS, prompts=prompts), expected, atol=5e-5)


def test_dense_layers_and_normalisation_in_their_order(tmp_path: Path) -> None:
    config, draw = CONFIGS["bert"], np.random.default_rng(1)
    weights = random_weights(shapes(config))
    write_model(tmp_path, config, weights)
    write_modules(
        tmp_path,
        ("Pooling", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("Dense", {"activation_function": "torch.nn.modules.activation.Tanh"}),
        ("Normalize", {}),
        ("Dense", {"activation_function": "torch.nn.modules.linear.Identity"}),
    )
    first, bias = draw.normal(size=(8, SIZE)), draw.normal(size=8)
    last = draw.normal(size=(3, 8))
    for name, arrays in (("2_Dense", {"weight": first, "bias": bias}), ("4_Dense", {"weight": last})):
        named = {f"linear.{key}": mx.array(array.astype(np.float32)) for key, array in arrays.items()}
        mx.save_safetensors(str(tmp_path / name / "model.safetensors"), named)
    states = [encoders.bert_states(weights, config, text)[0] for text in TEXTS]
    expected = [last @ unit(np.tanh(first @ state + bias)) for state in states]
    np.testing.assert_allclose(run(load(tmp_path), TEXTS), expected, atol=5e-5)


def classifier(kind: str, folder: Path, **changes: Any) -> tuple[dict[str, Any], Weights]:
    config = {**CONFIGS[kind], "architectures": ["XForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    config |= changes
    names = {
        "bert": ("pooler.dense", "classifier"),
        "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
        "modernbert": ("head.dense", "classifier"),
    }[kind]
    wanted: dict[str, tuple[int, ...]] = {
        f"{names[0]}.weight": (SIZE, SIZE),
        f"{names[0]}.bias": (SIZE,),
        f"{names[1]}.weight": (len(config["id2label"]), SIZE),
        f"{names[1]}.bias": (len(config["id2label"]),),
    }
    if kind == "modernbert":
        del wanted["head.dense.bias"]
        wanted["head.norm.weight"] = (SIZE,)
    weights = random_weights(shapes(config) | wanted, seed=3)
    write_model(folder, config, weights, PREFIXES.get(kind, f"{kind}."))
    return config, weights


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_cross_encoders_score_pairs(tmp_path: Path) -> None:
    types = [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0]]
    config, weights = classifier("bert", tmp_path / "bert")
    sent: list[Message] = []
    scores = run(load(tmp_path / "bert", sent), TEXTS, types)
    assert sent[-1].is_cross_encoder and sent[-1].size == 1  # type: ignore[attr-defined]
    for text, row, score in zip(TEXTS, types, scores, strict=True):
        first = np.tanh(
            encoders.linear(weights, "pooler.dense", encoders.bert_states(weights, config, text, row)[0])
        )
        assert score == pytest.approx([sigmoid(encoders.linear(weights, "classifier", first)[0])], abs=1e-5)

    # The model may say that it wants the logit as it is.
    plain = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    config, weights = classifier("xlm-roberta", tmp_path / "xlm", **plain)
    for text, score in zip(TEXTS, run(load(tmp_path / "xlm"), TEXTS, types), strict=True):
        state = encoders.bert_states(weights, config, text)[0]
        first = np.tanh(encoders.linear(weights, "classifier.dense", state))
        assert score == pytest.approx(encoders.linear(weights, "classifier.out_proj", first), abs=2e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernberts_classifier(pooling: str, tmp_path: Path) -> None:
    config, weights = classifier("modernbert", tmp_path, classifier_pooling=pooling)
    scores = run(load(tmp_path), TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        state = encoders.pooled(encoders.modernbert_states(weights, config, text), pooling)
        hidden = encoders.gelu(encoders.linear(weights, "head.dense", state))
        logit = encoders.linear(
            weights, "classifier", encoders.layer_norm(weights, "head.norm", hidden, 1e-5)
        )[0]
        assert score == pytest.approx([sigmoid(logit)], abs=1e-5)


@pytest.mark.parametrize(
    ("config", "modules", "message"),
    [
        ({**CONFIGS["bert"], "position_embedding_type": "relative_key"}, (), "relative_key"),
        ({**CONFIGS["bert"], "hidden_act": "softplus"}, (), "'softplus' is not supported"),
        ({**CONFIGS["bert"], "model_type": "jina_bert"}, (), "architecture 'jina_bert'"),
        ({**CONFIGS["qwen3"], "use_bidirectional_attention": True}, (), "both directions"),
        (
            {**CONFIGS["qwen3"], "architectures": ["Qwen3ForSequenceClassification"]},
            (),
            "architecture 'qwen3'",
        ),
        (CONFIGS["bert"], (("Pooling", {}), ("LSTM", {})), "module 'LSTM'"),
        (CONFIGS["bert"], (("Normalize", {}),), "no Pooling module"),
        (CONFIGS["bert"], (("Pooling", {"pooling_mode": "attention"}),), "pools by 'attention'"),
        (CONFIGS["bert"], (("Pooling", {}), ("Dense", {})), "2_Dense has no model.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    config: dict[str, Any], modules: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    write_model(
        tmp_path,
        config,
        random_weights(shapes({**config, "model_type": config["model_type"].removeprefix("jina_")})),
    )
    if modules:
        write_modules(tmp_path, *modules)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_a_classifier_of_many_classes_is_no_cross_encoder(tmp_path: Path) -> None:
    classifier("bert", tmp_path, id2label={"0": "a", "1": "b"})
    with pytest.raises(ConfigError, match="2 classes"):
        load(tmp_path)


@pytest.mark.parametrize("num_classes", [1, 2])
def test_the_plan_tool_agrees_with_the_worker(tmp_path: Path, num_classes: int) -> None:
    _, weights = classifier("bert", tmp_path, id2label={str(i): "x" for i in range(num_classes)})
    done = subprocess.run(
        [sys.executable, "-m", "mlxd.worker.embeddings.plan"],
        input=msgspec.json.encode({"embeddings": {"model": str(tmp_path), "dtype": "float32"}}),
        capture_output=True,
        timeout=60,
        check=True,
    )
    facts = json.loads(done.stdout)
    if num_classes == 1:
        sent: list[Message] = []
        load(tmp_path, sent)
        assert facts["weights_bytes"] == sum(array.nbytes for array in weights.values())
        assert facts["max_model_len"] == sent[-1].max_model_len  # type: ignore[attr-defined]
        assert (facts["is_cross_encoder"], facts["dtype"]) == (True, "float32")
    else:
        assert facts["fatal"] is True and "2 classes" in facts["error"]


def test_how_long_an_input_may_be(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIGS["bert"], random_weights(shapes(CONFIGS["bert"])))

    def limit(**options: Any) -> int:
        sent: list[Message] = []
        load(tmp_path, sent, **options)
        return sent[-1].max_model_len  # type: ignore[attr-defined,no-any-return]

    assert (limit(), limit(max_model_len=20), limit(max_model_len=99)) == (32, 20, 32)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    assert (limit(), limit(max_model_len=20)) == (12, 20)


def test_the_gelu_of_cpus_is_the_exact_one() -> None:
    x = np.concatenate([np.linspace(-8, 8, 4001), [-1e3, 1e3, -1e6, 0.0]])
    expected = encoders.gelu(x)
    assert np.abs(np.array(gelu(mx.array(x))) - expected).max() < 1e-6
    with pytest.raises(ValueError, match="Mish"):
        activation("torch.nn.Mish")


@pytest.mark.model
def test_minilm_is_what_it_is(tmp_path: Path) -> None:
    """Within 1e-4 cosine of its own weights in numpy, and of the figures on sentence-transformers' pages."""
    folder = fetch_demo_model(MINILM, lambda _: None)
    texts = [
        "The cat sits outside",
        "A man is playing guitar",
        "Größe, 東京, 🙂 and a word like antidisestablishmentarianism",
        "word " * 120,
    ]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    ids = sorted((tokenizer.encode(text).ids for text in texts), key=len, reverse=True)
    vectors = run(load(folder), ids)
    config = CONFIGS["bert"] | {"num_hidden_layers": 6, "num_attention_heads": 12, "layer_norm_eps": 1e-12}
    weights = {name: np.array(array) for name, array in mx.load(str(folder / "model.safetensors")).items()}
    for row, vector in zip(ids, vectors, strict=True):
        expected = unit(encoders.pooled(encoders.bert_states(weights, config, row), "mean"))
        assert 1 - vector @ expected < 1e-6
    cat, guitar = (ids.index(tokenizer.encode(text).ids) for text in texts[:2])
    # https://sbert.net/docs/sentence_transformer/usage/semantic_textual_similarity.html
    assert vectors[cat] @ vectors[guitar] == pytest.approx(0.0363, abs=1e-4)
