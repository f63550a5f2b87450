"""The runner against mlx-lm: the same logits and tokens, in any company and however cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxd.step import SamplingParams
from mlxd.worker.runner import Runner
from mlxd.worker.warmup import WarmStep
from tests.worker.driver import GREEDY, Driver
from tests.worker.tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, VOCAB_SIZE, tiny_model
from tests.worker.worker_plans import Row, slot_init, step_plan

NUM_BLOCKS = 300
BLOCK_SIZE = 4
NUM_OUTPUTS = 8


@cache
def model(name: str) -> nn.Module:
    return tiny_model(name)


@cache
def runner(name: str) -> Runner:
    return Runner(
        model(name), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=40, dtype=mx.float32
    )


@pytest.fixture
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    yield Driver(runner(request.param), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


every_architecture = pytest.mark.parametrize("driver", ARCHITECTURES, indirect=True)
two_architectures = pytest.mark.parametrize("driver", ["llama", "gemma2"], indirect=True)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def reference(model: nn.Module, prompt: list[int], num_outputs: int) -> tuple[list[int], mx.array]:
    """Greedy tokens from mlx-lm's model and cache, one token a call, and the logits they came from."""
    caches = make_prompt_cache(model)
    tokens, inputs, rows = [], prompt, []
    for _ in range(num_outputs):
        logits = model(mx.array([inputs]), cache=caches)[0, -1]
        rows.append(logits)
        tokens.append(int(mx.argmax(logits).item()))
        inputs = tokens[-1:]
    return tokens, mx.stack(rows)


def expected(driver: Driver, prompt: list[int], num_outputs: int = NUM_OUTPUTS) -> list[int]:
    return reference(driver.runner._model, prompt, num_outputs)[0]


class LogitsRecorder:
    """Stands before a runner's sampler and keeps the logits it is given."""

    def __init__(self, runner: Runner) -> None:
        self.logits: list[Any] = []
        self._sampler = runner._sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def sample(self, logits: mx.array, *args: Any) -> Any:
        self.logits.append(np.array(logits))
        return self._sampler.sample(logits, *args)


@every_architecture
def test_logits_are_mlx_lms(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = LogitsRecorder(driver.runner)
    monkeypatch.setattr(driver.runner, "_sampler", recorder)
    sequence = driver.add(prompt_of(13))
    driver.run(NUM_OUTPUTS)
    tokens, logits = reference(driver.runner._model, sequence.prompt, NUM_OUTPUTS)
    np.testing.assert_allclose(np.concatenate(recorder.logits), np.array(logits), atol=1e-4)
    assert sequence.outputs == tokens
    assert len(set(tokens)) > 1


@every_architecture
def test_greedy_is_the_same_among_31_that_sample(driver: Driver) -> None:
    noise = [
        driver.add(prompt_of(3 + seed, seed), SamplingParams(temperature=1.5, seed=seed))
        for seed in range(1, 32)
    ]
    sequence = driver.add(prompt_of(13))
    driver.run(NUM_OUTPUTS)
    assert sequence.outputs == expected(driver, sequence.prompt)
    assert len({tuple(other.outputs) for other in noise}) == len(noise)


@every_architecture
def test_greedy_is_the_same_in_chunks_of_every_size(driver: Driver) -> None:
    prompt = prompt_of(13)
    sequences = [driver.add(prompt, chunk_size=size) for size in range(1, len(prompt) + 1)]
    driver.run(NUM_OUTPUTS)
    tokens = expected(driver, prompt, NUM_OUTPUTS + len(prompt))
    for sequence in sequences:
        assert sequence.outputs == tokens[: len(sequence.outputs)]


@every_architecture
def test_greedy_is_the_same_after_preemption(driver: Driver) -> None:
    sequence, other = driver.add(prompt_of(13)), driver.add(prompt_of(6, seed=1))
    driver.run(3)
    driver.preempt(sequence)
    driver.run(NUM_OUTPUTS)
    assert sequence.outputs == expected(driver, sequence.prompt)
    assert other.outputs[:NUM_OUTPUTS] == expected(driver, other.prompt)


@every_architecture
def test_greedy_is_the_same_from_shared_and_copied_blocks(driver: Driver) -> None:
    source = driver.add(prompt_of(15))
    driver.run(2)
    copy = driver.fork(source)
    driver.run(NUM_OUTPUTS)
    tokens = expected(driver, source.prompt, NUM_OUTPUTS + 2)
    assert copy.outputs == tokens[:NUM_OUTPUTS]
    assert source.outputs == tokens


@two_architectures
def test_one_step_in_flight_changes_nothing(driver: Driver) -> None:
    sequences = [driver.add(prompt_of(5 + seed, seed), chunk_size=4) for seed in range(5)]
    driver.run(NUM_OUTPUTS, wait=False)
    for sequence in sequences:
        assert sequence.outputs[:NUM_OUTPUTS] == expected(driver, sequence.prompt)


@two_architectures
def test_slots_and_blocks_can_be_used_again(driver: Driver) -> None:
    for seed in range(60):
        sequence = driver.add(prompt_of(25, seed))
        driver.run(2, wait=False)
        driver.remove(sequence)
        assert sequence.outputs == expected(driver, sequence.prompt, 2)


@two_architectures
def test_ragged_contexts_go_in_groups(driver: Driver) -> None:
    lengths = [3, 120, 5, 118, 4, 40, 7, 41, 6, 119]
    sequences = [driver.add(prompt_of(length, length)) for length in lengths]
    driver.run(NUM_OUTPUTS)
    for sequence in sequences:
        assert sequence.outputs == expected(driver, sequence.prompt)


def test_long_chunks_go_in_tiles_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxd.worker.attention.gather.MAX_SCORES", 4 * 33 * 5)
    for name in ("llama", "gemma2"):
        driver = Driver(runner(name), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        sequence = driver.add(prompt_of(33))
        driver.run(NUM_OUTPUTS)
        assert sequence.outputs == expected(driver, sequence.prompt)


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_more_architectures(name: str) -> None:
    architecture = tiny_model(name)
    tiny = Runner(architecture, num_blocks=40, block_size=BLOCK_SIZE, max_num_seqs=4, dtype=mx.float32)
    assert tiny.self_check() == []
    driver = Driver(tiny, num_blocks=40, block_size=BLOCK_SIZE)
    sequences = [driver.add(prompt_of(9)), driver.add(prompt_of(14, 1), chunk_size=5)]
    driver.run(NUM_OUTPUTS)
    for sequence in sequences:
        tokens, _ = reference(architecture, sequence.prompt, NUM_OUTPUTS)
        assert sequence.outputs[:NUM_OUTPUTS] == tokens


def test_greedy_is_generate_steps_own() -> None:
    generate_step = pytest.importorskip("mlx_lm.generate").generate_step
    driver = Driver(runner("llama"), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    sequence = driver.add(prompt_of(20))
    driver.run(30)
    theirs = [token for token, _ in generate_step(mx.array(sequence.prompt), model("llama"), max_tokens=30)]
    assert sequence.outputs == theirs


@pytest.mark.parametrize("driver", ["mistral"], indirect=True)
def test_a_request_that_is_not_a_number_fails_alone(driver: Driver) -> None:
    weights = driver.runner._model.model.embed_tokens
    bad_token = 7
    clean = weights.weight
    neighbour = driver.add([token for token in prompt_of(20) if token != bad_token])
    failing = driver.add([1, bad_token, 2, 3, 4])
    spoilt = clean * 1
    spoilt[bad_token] = mx.nan
    try:
        weights.weight = spoilt
        driver.run(3)
        assert failing.outputs == [-1] * 3
        assert failing.errors == [], "which would be the request's"
        driver.remove(failing)
        # Its blocks go to the next one, whose masked positions then hold what it left.
        heir = driver.add([5, 6])
        heir.blocks = failing.blocks
        for _ in range(3):
            driver.step()
    finally:
        weights.weight = clean
    assert heir.outputs[:3] == expected(driver, heir.prompt, 3)
    assert neighbour.outputs == expected(driver, neighbour.prompt, 6)
    assert neighbour.errors == [] == heir.errors


def test_steps_that_sample_nothing() -> None:
    driver = Driver(runner("llama"), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    sequence = driver.add(prompt_of(9), chunk_size=4)
    driver.step()
    assert sequence.outputs == []
    driver.step()
    driver.run(NUM_OUTPUTS)
    assert sequence.outputs == expected(driver, sequence.prompt)


def test_mlx_lms_own_caches_serve_what_cannot_be_paged() -> None:
    layers = ["full_attention", "sliding_attention"]
    tiny = tiny_model("llama", num_hidden_layers=2, layer_types=layers, sliding_window=8)
    slots = Runner(tiny, num_blocks=2, block_size=4, max_num_seqs=4, dtype=mx.float32, paged=False)
    assert slots.attention_name == "mlx-lm"
    driver = Driver(slots, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_slots=4)
    sequences = [driver.add(prompt_of(19), chunk_size=6), driver.add(prompt_of(5, 1))]
    driver.run(4)
    driver.preempt(sequences[1])
    driver.run(NUM_OUTPUTS)
    for sequence in sequences:
        tokens, _ = reference(tiny, sequence.prompt, NUM_OUTPUTS)
        assert sequence.outputs[:NUM_OUTPUTS] == tokens


def test_a_step_waits_for_nothing_of_the_next_one() -> None:
    """Else its tokens would come a step late, and the device would idle until the front has them."""
    runner = Runner(tiny_model("llama"), num_blocks=4, block_size=16, max_num_seqs=2, dtype=mx.float32)
    first = runner.launch(step_plan(1, [Row(0, [1], 3, [5, 6, 7])], 16, admit=[slot_init(0, 3)]))
    before = [np.array(array) for array in first._arrays]
    second = runner.launch(step_plan(2, [Row(0, [1], 4)], 16))
    second.result()
    for array, value in zip(first._arrays, before, strict=True):
        np.testing.assert_array_equal(np.array(array), value)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_steps_keys_live_in_the_pool_alone(name: str) -> None:
    runner = Runner(model(name), num_blocks=60, block_size=BLOCK_SIZE, max_num_seqs=4, dtype=mx.float32)
    driver = Driver(runner, num_blocks=60, block_size=BLOCK_SIZE, num_slots=4)
    driver.add(prompt_of(200), chunk_size=100)
    driver.step()
    with_keys = mx.get_active_memory()
    driver.sequences[0].chunk_size = 1
    driver.step()
    # Not nothing: what a step without logits gives is a part of its tokens' hidden states.
    assert with_keys - mx.get_active_memory() < 75 * runner.block_bytes // BLOCK_SIZE


def test_steps_that_may_be_left_out_are_warmed_up_while_there_is_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = Runner(model("llama"), num_blocks=40, block_size=BLOCK_SIZE, max_num_seqs=4, dtype=mx.float32)
    steps = [*(WarmStep(1, context, optional=True) for context in range(1, 9)), WarmStep(2)]
    monkeypatch.setattr(tiny._forward, "warm_steps", lambda limits: steps)
    launched = []
    monkeypatch.setattr(
        tiny, "launch", lambda plan, launch=tiny.launch: launched.append(plan.num_decode_rows) or launch(plan)
    )
    tiny.warmup(clock=itertools.count(100.0, 2.0).__next__)
    assert launched == [1, 1, 1, 2]


def test_warm_up_leaves_nothing_behind() -> None:
    tiny = Runner(model("llama"), num_blocks=40, block_size=BLOCK_SIZE, max_num_seqs=4, dtype=mx.float32)
    tiny.warmup()
    assert tiny.self_check() == []
    driver = Driver(tiny, num_blocks=40, block_size=BLOCK_SIZE, num_slots=4)
    sequence = driver.add(prompt_of(9), GREEDY)
    driver.run(NUM_OUTPUTS)
    assert sequence.outputs == expected(driver, sequence.prompt)
