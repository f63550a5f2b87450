"""The sampler against a plain reference: every parameter alone, all together, and in any company."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlxd.step import SamplingParams, SlotInit, TokenLogprobs
from mlxd.worker.sampler import Sampler
from tests.worker.sampling_reference import distribution, token

Array = npt.NDArray[np.float32]

PARAMS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.3),
    "hot": SamplingParams(temperature=1.9),
    "top_k_1": SamplingParams(top_k=1),
    "top_k_64": SamplingParams(temperature=2.0, top_k=64),
    "top_k_200": SamplingParams(temperature=2.0, top_k=200),
    "top_k_large": SamplingParams(temperature=2.0, top_k=500),
    "top_k_above_vocabulary": SamplingParams(top_k=100_000),
    "top_p": SamplingParams(top_p=0.7),
    "top_p_tiny": SamplingParams(top_p=1e-6),
    "top_p_hot": SamplingParams(temperature=1.9, top_p=0.95),
    "min_p": SamplingParams(min_p=0.1),
    "top_k_top_p": SamplingParams(top_k=20, top_p=0.8),
    "top_k_large_top_p": SamplingParams(temperature=1.7, top_k=400, top_p=0.9),
    "top_k_min_p_top_p": SamplingParams(top_k=50, min_p=0.02, top_p=0.9),
    "min_p_top_p": SamplingParams(min_p=0.02, top_p=0.8),
    "repetition": SamplingParams(repetition_penalty=1.5),
    "presence": SamplingParams(presence_penalty=1.3),
    "frequency": SamplingParams(frequency_penalty=0.7),
    "greedy_penalties": SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=-0.4),
    "bias": SamplingParams(logit_bias={3: 6.0, 4: -100.0, 77: 4.5}),
    "greedy_bias": SamplingParams(temperature=0.0, logit_bias={9: 100.0}),
    "min_tokens": SamplingParams(temperature=0.0, min_tokens=4, stop_token_ids=tuple(range(250))),
    "everything": SamplingParams(
        temperature=0.8,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={5: 3.0},
        min_tokens=2,
        stop_token_ids=(1, 2),
        logprobs=3,
    ),
}
NAMES = list(PARAMS)
VOCAB_SIZES = [300, 1000, 2048]


def seeded(name: str, seed: int) -> SamplingParams:
    params = PARAMS[name]
    values = {field: getattr(params, field) for field in params.__struct_fields__}
    return SamplingParams(**{**values, "seed": seed})


def logits_for(names: list[str], vocab_size: int, step: int) -> Array:
    """[len(names), vocab_size]; a name's row does not depend on its neighbours."""
    rows = [
        np.random.default_rng([NAMES.index(name), vocab_size, step]).normal(0, 2.5, vocab_size)
        for name in names
    ]
    return np.array(rows, dtype=np.float32)


def history_of(name: str, vocab_size: int) -> tuple[list[int], list[int]]:
    """Prompt and output tokens so far."""
    generator = np.random.default_rng(NAMES.index(name))
    return generator.integers(vocab_size, size=40).tolist(), generator.integers(40, size=2).tolist()


class Bench:
    """A sampler with one request a slot, fed with logits that need no model."""

    def __init__(self, names: list[str], vocab_size: int, *, seed: int = 0) -> None:
        self.names = names
        self.vocab_size = vocab_size
        self.params = [seeded(name, seed + NAMES.index(name)) for name in names]
        self.histories = [history_of(name, vocab_size) for name in names]
        self.sampler = Sampler(vocab_size, len(names))
        for slot in range(len(names)):
            self.admit(slot)

    def admit(self, slot: int) -> None:
        params, (prompt, output) = self.params[slot], self.histories[slot]
        tokens = prompt + output if params.needs_token_history else []
        data = np.array(tokens, dtype=np.int32).tobytes()
        self.sampler.admit(SlotInit(slot, str(slot), len(prompt), params, data))

    @property
    def context_lens(self) -> list[int]:
        return [len(prompt) + len(output) for prompt, output in self.histories]

    def step(self, logits: Array, order: list[int] | None = None) -> list[int]:
        """Sample one token a slot, in any order of rows, and add it to the histories."""
        slots = np.array(order or range(len(self.names)), dtype=np.int32)
        sampled = self.sampler.sample(
            mx.array(logits[slots]), slots, np.array(self.context_lens, dtype=np.int32)[slots]
        )
        tokens = np.array(sampled.tokens)[np.argsort(slots)].tolist()
        for (_, output), sampled_token in zip(self.histories, tokens, strict=True):
            output.append(sampled_token)
        return tokens

    def expected(self, logits: Array) -> list[int]:
        return [
            token(distribution(row, params, *history), params.seed, position)
            for row, params, history, position in zip(
                logits, self.params, self.histories, self.context_lens, strict=True
            )
        ]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_tokens_are_the_references(vocab_size: int) -> None:
    for seed in range(0, 500, 100):
        bench = Bench(NAMES, vocab_size, seed=seed)
        for step in range(4):
            logits = logits_for(NAMES, vocab_size, step)
            expected = bench.expected(logits)
            assert dict(zip(NAMES, bench.step(logits), strict=True)) == dict(
                zip(NAMES, expected, strict=True)
            )


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_neighbours_and_order_change_nothing(vocab_size: int) -> None:
    together = Bench(NAMES, vocab_size)
    reverse = Bench(NAMES, vocab_size)
    alone = [Bench([name], vocab_size, seed=0) for name in NAMES]
    for step in range(3):
        logits = logits_for(NAMES, vocab_size, step)
        tokens = together.step(logits)
        assert reverse.step(logits, order=list(range(len(NAMES)))[::-1]) == tokens
        assert [bench.step(logits[index : index + 1])[0] for index, bench in enumerate(alone)] == tokens


def test_a_slot_admitted_again_goes_on_as_before() -> None:
    steady, preempted = Bench(NAMES, 300), Bench(NAMES, 300)
    for step in range(6):
        if step == 3:
            for slot in range(len(NAMES)):
                preempted.sampler.release(slot)
            for slot in reversed(range(len(NAMES))):
                preempted.admit(slot)
        logits = logits_for(NAMES, 300, step)
        assert preempted.step(logits) == steady.step(logits)


@pytest.mark.parametrize(
    "name", ["plain", "hot", "top_k_64", "top_p", "top_p_hot", "min_p", "top_k_top_p", "min_p_top_p"]
)
def test_frequencies_follow_the_distribution(name: str) -> None:
    """Chi-square over 40,000 draws with seeds of their own, cells of at least 20 expected draws."""
    vocab_size, rows, rounds = 300, 2000, 20
    logits = logits_for([name], vocab_size, 0)
    probabilities = distribution(logits[0], PARAMS[name], [], [])
    sampler = Sampler(vocab_size, rows)
    counts = np.zeros(vocab_size)
    slots = np.arange(rows, dtype=np.int32)
    for slot in range(rows):
        sampler.admit(SlotInit(slot, "", 0, seeded(name, slot)))
    batch = mx.broadcast_to(mx.array(logits), (rows, vocab_size))
    for position in range(rounds):
        tokens = np.array(sampler.sample(batch, slots, np.full(rows, position, dtype=np.int32)).tokens)
        counts += np.bincount(tokens, minlength=vocab_size)
    expected = probabilities * rows * rounds
    assert counts[expected == 0].sum() == 0
    large = expected >= 20
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    degrees = len(wanted) - 1
    # Mean `degrees`, variance twice that; four deviations away is 1 in 30,000.
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


def test_stop_tokens_are_banned_until_min_tokens_are_out() -> None:
    sampler = Sampler(10, 1)
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(7, 8))
    sampler.admit(SlotInit(0, "", 5, params))
    logits = mx.array([[0, 0, 0, 1, 0, 0, 0, 9, 8, 0]], dtype=mx.float32)
    tokens = [
        sampler.sample(logits, np.array([0], dtype=np.int32), np.array([context], dtype=np.int32))
        for context in (5, 6, 7)
    ]
    assert [int(sampled.tokens.item()) for sampled in tokens] == [3, 3, 7]


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_numbers_fail_alone(name: str) -> None:
    names = [name, name, name, "plain"]
    clean, spoilt = Bench(names, 300), Bench(names, 300)
    logits = logits_for(names, 300, 0)
    tokens = clean.step(logits)
    logits[0, 5] = np.nan
    logits[2, 6] = np.inf
    assert spoilt.step(logits) == [-1, tokens[1], -1, tokens[3]]
    assert (np.array(spoilt.sampler.last_tokens) >= 0).all()


def test_tokens_that_the_model_masks_are_never_sampled() -> None:
    bench = Bench(NAMES, 300)
    logits = logits_for(NAMES, 300, 0)
    logits[:, ::2] = -np.inf
    tokens = dict(zip(NAMES, bench.step(logits), strict=True))
    assert all(token % 2 == 1 for token in tokens.values())


def test_ties_are_broken_by_token_id_when_greedy_and_all_kept_by_top_k() -> None:
    sampler = Sampler(400, 2)
    sampler.admit(SlotInit(0, "", 0, SamplingParams(temperature=0.0)))
    slots = np.array([0, 1], dtype=np.int32)
    logits = np.zeros((2, 400), dtype=np.float32)
    logits[:, 100:104] = 20
    seen = set()
    for seed in range(40):
        sampler.admit(SlotInit(1, "", 0, SamplingParams(top_k=2, seed=seed)))
        tokens = sampler.sample(mx.array(logits), slots, np.array([1, 1], dtype=np.int32)).tokens.tolist()
        assert tokens[0] == 100
        seen.add(tokens[1])
    assert seen == {100, 101, 102, 103}


def test_a_bias_outside_the_vocabulary_fails_its_own_row() -> None:
    sampler = Sampler(50, 2)
    sampler.admit(SlotInit(0, "", 1, SamplingParams(temperature=0.0, logit_bias={50: 1.0})))
    sampler.admit(SlotInit(1, "", 1, SamplingParams(temperature=0.0, logit_bias={49: 1.0})))
    slots = np.array([0, 1], dtype=np.int32)
    sampled = sampler.sample(mx.zeros((2, 50)), slots, np.array([1, 1], dtype=np.int32))
    assert sampled.tokens.tolist()[1] == 49
    assert sampled.errors == [(0, "token id 50 is outside the vocabulary of 50 tokens")]


def test_logprobs_are_of_the_raw_distribution() -> None:
    vocab_size = 300
    counts = [-1, 0, 2, 20]
    sampler = Sampler(vocab_size, len(counts))
    slots = np.arange(len(counts), dtype=np.int32)
    for slot, count in enumerate(counts):
        params = SamplingParams(temperature=1.7, logit_bias={slot: 3.0}, seed=slot, logprobs=count)
        sampler.admit(SlotInit(slot, "", 1, params))
    logits = logits_for(NAMES[: len(counts)], vocab_size, 0)
    logits[3, :10] = logits[3, 10]
    sampled = sampler.sample(mx.array(logits), slots, np.ones(len(counts), dtype=np.int32))
    assert sampled.logprobs is not None
    entries = sampled.logprobs.result(len(counts))
    assert entries[0] is None
    wide = logits.astype(np.float64)
    raw = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    for slot in range(1, len(counts)):
        entry, chosen = entries[slot], int(sampled.tokens[slot].item())
        assert isinstance(entry, TokenLogprobs)
        assert entry.logprob == pytest.approx(raw[slot, chosen], abs=1e-5)
        assert entry.rank == (raw[slot] > raw[slot, chosen]).sum() + 1
        best = np.lexsort((np.arange(vocab_size), -raw[slot]))[: counts[slot]]
        assert list(entry.top_token_ids) == best.tolist()
        np.testing.assert_allclose(entry.top_logprobs, raw[slot, best], atol=1e-5)


def test_no_logprobs_cost_nothing_and_minus_infinity_is_a_number_json_has() -> None:
    sampler = Sampler(4, 1)
    slot, context = np.array([0], dtype=np.int32), np.array([1], dtype=np.int32)
    sampler.admit(SlotInit(0, "", 1, SamplingParams(temperature=0.0)))
    logits = mx.array([[1.0, -mx.inf, 0.0, -mx.inf]])
    assert sampler.sample(logits, slot, context).logprobs is None
    sampler.admit(SlotInit(0, "", 1, SamplingParams(temperature=0.0, logprobs=4)))
    logprobs = sampler.sample(logits, slot, context).logprobs
    assert logprobs is not None
    (entry,) = logprobs.result(1)
    assert entry is not None
    assert entry.top_token_ids == (0, 2, 1, 3)
    assert entry.top_logprobs[2:] == (-9999.0, -9999.0)


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = logits_for(["plain"], 300, 0).astype(np.float16)
    half, single = Bench(["plain"], 300), Bench(["plain"], 300)
    assert half.step(logits) == single.step(logits.astype(np.float32))
