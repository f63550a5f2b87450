"""Prompt log-probabilities against mlx-lm's own logits: any chunks, any company, both forwards."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxd.step import PromptRow, SamplingParams
from mlxd.worker.logprobs import MIN_LOGPROB, PromptTokenLogprobs
from mlxd.worker.runner import Runner
from tests.worker.driver import GREEDY, Driver, Sequence, int32
from tests.worker.test_runner import BLOCK_SIZE, NUM_BLOCKS, model, prompt_of, runner
from tests.worker.tiny_models import VOCAB_SIZE

Array = Any


def reference(model: nn.Module, prompt: list[int]) -> Array:
    """float64 [len(prompt) - 1, vocab_size]: log-probabilities of what follows each token but the last."""
    logits = np.array(model(mx.array([prompt]))[0, :-1].astype(mx.float32)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def gathered(sequence: Sequence) -> tuple[Array, Array, Array, Array]:
    """logprobs [n], ranks [n], top token ids and top logprobs [n, K] of all chunks."""
    parts: list[list[Array]] = [[], [], [], []]
    for rows, result in sequence.prompt_results:
        shape, num_top = (-1, result.num_top), min(result.num_top, sequence.prompt_logprobs)
        parts[0].append(np.frombuffer(result.logprobs, "<f4")[rows.start : rows.stop])
        parts[1].append(np.frombuffer(result.ranks, "<i4")[rows.start : rows.stop])
        ids = np.frombuffer(result.top_token_ids, "<i4")
        values = np.frombuffer(result.top_logprobs, "<f4")
        if result.num_top:
            parts[2].append(ids.reshape(shape)[rows.start : rows.stop, :num_top])
            parts[3].append(values.reshape(shape)[rows.start : rows.stop, :num_top])
    logprobs, ranks, top_ids, top = (np.concatenate(part) if part else np.empty(0) for part in parts)
    return logprobs, ranks, top_ids, top


def check_prompt(model: nn.Module, sequence: Sequence) -> None:
    expected = reference(model, sequence.prompt)
    targets = np.array(sequence.prompt[1:])
    chosen = np.take_along_axis(expected, targets[:, None], axis=-1)
    logprobs, ranks, top_ids, top = gathered(sequence)
    np.testing.assert_allclose(logprobs, chosen[:, 0], atol=1e-4)
    # Ranks of near-equals may differ by rounding: count with a margin on either side.
    assert ((expected > chosen + 1e-4).sum(axis=-1) < ranks).all()
    assert (ranks <= (expected > chosen - 1e-4).sum(axis=-1) + 1).all()
    if sequence.prompt_logprobs:
        best = -np.sort(-expected, axis=-1)[:, : sequence.prompt_logprobs]
        np.testing.assert_allclose(top, best, atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(expected, top_ids, axis=-1), best, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("paged", [True, False])
def test_they_are_mlx_lms_among_others_and_in_chunks(name: str, paged: bool) -> None:
    tiny = runner(name) if paged else slots(name)
    driver = Driver(tiny, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    sampling = driver.add(prompt_of(5, 9), SamplingParams(temperature=0.9, seed=1, logprobs=2))
    driver.run(2)
    asking = [
        driver.add(prompt_of(20, 1), chunk_size=7, prompt_logprobs=1),
        driver.add(prompt_of(13, 2), prompt_logprobs=0),
        driver.add(prompt_of(11, 3), chunk_size=1, prompt_logprobs=20),
        driver.add(prompt_of(1, 4), prompt_logprobs=3),
    ]
    driver.add(prompt_of(9, 5), chunk_size=4)
    driver.run(3, wait=False)
    for sequence in asking[:3]:
        check_prompt(model(name), sequence)
    assert asking[3].prompt_results == []
    assert all(entry is not None for entry in sampling.logprobs)


def slots(name: str) -> Runner:
    tiny = Runner(model(name), num_blocks=2, block_size=4, max_num_seqs=40, dtype=mx.float32, paged=False)
    assert tiny.attention_name == "mlx-lm"
    return tiny


def test_asking_changes_nobodys_tokens() -> None:
    prompts = [prompt_of(12, seed) for seed in range(4)]
    outputs = []
    for num_top in (-1, 2):
        driver = Driver(runner("llama"), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        for prompt in prompts:
            driver.add(prompt, GREEDY, chunk_size=5, prompt_logprobs=num_top)
        driver.run(6)
        outputs.append([sequence.outputs[:6] for sequence in driver.sequences])
    assert outputs[0] == outputs[1]


def test_the_best_is_the_token_itself_to_the_bit_where_it_is_greedy() -> None:
    """lm-eval decides by equality whether a token was the likeliest."""
    logits = mx.array(np.random.default_rng(0).normal(size=(50, 300)).astype(np.float32))
    tokens = np.array(mx.argmax(logits, axis=-1)).astype(np.int32)
    for num_top in (1, 5):
        result = PromptTokenLogprobs(logits, [PromptRow(0, 0, int32(tokens), num_top)]).result()
        best = np.frombuffer(result.top_logprobs, "<f4").reshape(50, num_top)
        assert (np.frombuffer(result.logprobs, "<f4") == best[:, 0]).all()
        assert (np.frombuffer(result.ranks, "<i4") == 1).all()
        assert (np.frombuffer(result.top_token_ids, "<i4").reshape(50, num_top)[:, 0] == tokens).all()


def test_equals_come_by_token_id_and_nothing_is_infinite() -> None:
    logits = np.full((2, 40), -np.inf, dtype=np.float32)
    logits[:, [3, 9, 30]] = 1.0
    logits[1] = np.nan
    result = PromptTokenLogprobs(mx.array(logits), [PromptRow(0, 0, int32([5, 5]), 4)]).result()
    ids = np.frombuffer(result.top_token_ids, "<i4").reshape(2, 4)
    assert ids[0, :3].tolist() == [3, 9, 30]
    logprobs = np.frombuffer(result.logprobs, "<f4")
    assert logprobs[0] == MIN_LOGPROB and np.isnan(logprobs[1])
    np.testing.assert_allclose(np.frombuffer(result.top_logprobs, "<f4")[:3], np.log(1 / 3), atol=1e-6)


@pytest.mark.parametrize("vocab_size", [49152, 50257])
def test_a_large_vocabulary_is_added_up_without_loss(vocab_size: int) -> None:
    logits = (3 * np.random.default_rng(0).normal(size=(4, vocab_size))).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = wide[:, 7] - np.log(np.exp(wide).sum(axis=-1))
    result = PromptTokenLogprobs(mx.array(logits), [PromptRow(0, 0, int32([7] * 4), 0)]).result()
    tolerance = 3e-6 if vocab_size == 49152 else 2e-4
    np.testing.assert_allclose(np.frombuffer(result.logprobs, "<f4"), expected, atol=tolerance)


def test_no_more_alternatives_than_the_vocabulary_has() -> None:
    logits = mx.zeros((1, 3))
    result = PromptTokenLogprobs(logits, [PromptRow(0, 0, int32([0]), 20)]).result()
    assert result.num_top == 3
    assert VOCAB_SIZE > 20
