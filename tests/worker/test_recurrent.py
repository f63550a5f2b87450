"""Models with recurrent or convolutional state over the pool: mlx-lm's tokens in any company, however cut."""

from __future__ import annotations

import gc
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxd.step import SamplingParams
from mlxd.worker.kernels.paged import PagedKernels
from mlxd.worker.runner import Runner, UnsupportedModelError, check_supported
from mlxd.worker.state_store import States, StateStore
from tests.worker.driver import Driver, Sequence
from tests.worker.recurrent_models import RECURRENT
from tests.worker.test_prompt_logprobs import check_prompt
from tests.worker.test_runner import prompt_of, reference
from tests.worker.tiny_models import tiny_model

NUM_BLOCKS = 120
BLOCK_SIZE = 4
NUM_OUTPUTS = 4
SHAPES = [(4, 0), (13, 0), (11, 4), (4, 1), (1, 0)]
"""lengths of prompts, and of the chunks that they come in (0: one)"""


@cache
def model(name: str) -> nn.Module:
    return tiny_model(name)


def make_driver(name: str, *, paged: bool = True, num_snapshots: int = 0) -> Driver:
    runner = Runner(
        model(name),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        dtype=mx.float32,
        paged=paged,
        num_snapshots=num_snapshots,
    )
    return Driver(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_slots=8)


def check(sequence: Sequence, name: str) -> None:
    tokens, _ = reference(model(name), sequence.prompt, len(sequence.outputs))
    assert len(sequence.outputs) >= NUM_OUTPUTS
    assert sequence.outputs == tokens


def keep_state(driver: Driver, sequence: Sequence, num_tokens: int, snapshot: int) -> None:
    """Have the state saved that a sequence which decodes has behind so many tokens."""
    while sequence.num_computed < num_tokens - 1:
        driver.step(wait=False)
    assert sequence.num_computed == num_tokens - 1
    driver.save(sequence, snapshot)
    driver.step(wait=False)


@pytest.mark.parametrize("name", RECURRENT)
def test_tokens_are_mlx_lms(name: str) -> None:
    """In steps that mix decode rows and chunks of all kinds, one in flight; one sequence begins anew, and one
    comes later, in a slot that another has left."""
    driver = make_driver(name)
    assert not driver.runner.shares_prefixes
    sequences = [driver.add(prompt_of(length, length), chunk_size=size) for length, size in SHAPES]
    gone = driver.add(prompt_of(9, 2))
    driver.run(2, wait=False)
    driver.remove(gone)
    driver.preempt(sequences[2])
    driver._slots.sort(key=lambda slot: slot != gone.slot)
    sequences.append(driver.add(prompt_of(5, 3)))
    assert sequences[-1].slot == gone.slot
    driver.run(NUM_OUTPUTS, wait=False)
    for sequence in sequences:
        check(sequence, name)
    assert len({tuple(sequence.outputs[:NUM_OUTPUTS]) for sequence in sequences}) > 2


@pytest.mark.parametrize("name", RECURRENT)
def test_sequences_go_on_from_states_that_were_kept(name: str) -> None:
    """Of a chunk, of a decode row among others, and of one that went on from such a state itself; again and
    again, also when another state has come under its number in the same step."""
    driver = make_driver(name, num_snapshots=3)
    assert driver.runner.shares_prefixes and driver.runner.num_snapshots == 3
    first = driver.add(prompt_of(10), chunk_size=8)
    driver.save(first, 0)
    driver.step()
    other = driver.add(prompt_of(7, 3))
    driver.run(2, wait=False)
    keep_state(driver, first, 12, 1)
    driver.drain()
    known = [*first.prompt, *first.outputs][:12]
    begun = known[:8], first.blocks[:2]
    goes_on = known, first.blocks[:3]
    resumed = [
        driver.resume(0, begun[1], [*begun[0], *prompt_of(5, 1)], chunk_size=4),
        driver.resume(0, begun[1], [*begun[0], *prompt_of(3, 2)]),
        driver.resume(1, goes_on[1], [*goes_on[0], *prompt_of(6, 4)]),
    ]
    driver.save(resumed[0], 0)
    driver.step(wait=False)
    resumed.append(driver.resume(0, resumed[0].blocks[:3], [*resumed[0].prompt[:12], 7, 9]))
    driver.run(NUM_OUTPUTS, wait=False)
    for sequence in (first, other, *resumed):
        check(sequence, name)


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2"])
def test_greedy_is_the_same_in_chunks_of_every_size_among_others_that_sample(name: str) -> None:
    driver = make_driver(name)
    driver.add(prompt_of(11, 5), SamplingParams(temperature=1.5, seed=1))
    prompt = prompt_of(7)
    sequences = [driver.add(prompt, chunk_size=size) for size in range(1, len(prompt) + 1)]
    driver.run(NUM_OUTPUTS)
    for sequence in sequences:
        check(sequence, name)


def test_who_is_left_out_of_some_steps_goes_on_where_it_was() -> None:
    """As requests are whose clients read too slowly."""
    driver = make_driver("qwen3_5")
    sequences = [driver.add(prompt_of(length, length)) for length in (4, 9, 6)]
    driver.run(2, wait=False)
    paused = driver.sequences.pop(1)
    driver.run(4, wait=False)
    driver.sequences.insert(0, paused)
    driver.run(NUM_OUTPUTS + 2, wait=False)
    for sequence in sequences:
        check(sequence, "qwen3_5")


@pytest.mark.parametrize("name", ["qwen3_5", "mamba"])
def test_prompts_log_probabilities_come_in_the_order_that_was_asked(name: str) -> None:
    driver = make_driver(name)
    sampling = driver.add(prompt_of(5, 9), SamplingParams(temperature=0.9, seed=1, logprobs=2))
    driver.run(2)
    asking = [
        driver.add(prompt_of(20, 1), chunk_size=7, prompt_logprobs=1),
        driver.add(prompt_of(13, 2), prompt_logprobs=3),
    ]
    greedy = driver.add(prompt_of(9, 5), chunk_size=4)
    driver.run(NUM_OUTPUTS, wait=False)
    for sequence in asking:
        check_prompt(model(name), sequence)
        check(sequence, name)
    check(greedy, name)
    assert all(entry is not None for entry in sampling.logprobs)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_what_is_not_a_number_stays_with_its_sequence(name: str) -> None:
    driver = make_driver(name)
    neighbour = driver.add(prompt_of(9))
    failing = driver.add(prompt_of(6, 1))
    driver.run(2)
    batch = driver.runner._forward._store._batches[failing.slot]  # type: ignore[attr-defined]
    row = mx.arange(batch.num_rows) == batch.rows[failing.slot]
    batch.states = [
        [mx.where(row.reshape(-1, *[1] * (array.ndim - 1)), mx.nan, array) for array in layer]
        for layer in batch.states
    ]
    driver.step()
    driver.step()
    assert failing.outputs[-2:] == [-1, -1] and failing.errors == []
    driver.remove(failing)
    driver._slots.insert(0, driver._slots.pop())
    heir = driver.add(prompt_of(5, 3))
    assert heir.slot == failing.slot
    heir.blocks = failing.blocks
    for _ in range(NUM_OUTPUTS):
        driver.step()
    check(heir, name)
    check(neighbour, name)


def test_decode_rows_run_as_compiled_graphs() -> None:
    """Of a model without attention, so that no kernel is needed: in batches that grow, shrink and fill up. Of
    one the states are kept, alone and in company."""
    runner = Runner(
        model("mamba2"),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        dtype=mx.float32,
        kernels=PagedKernels("metal", 4),
        num_snapshots=2,
    )
    assert runner.self_check() == [] and runner.attention_name == "recurrent"
    runner.warmup(1)
    driver = Driver(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_slots=4)
    sequences = []
    for length in (4, 9, 5):
        sequences.append(driver.add(prompt_of(length, length), chunk_size=4))
        driver.run(1, wait=False)
    gone = sequences.pop(1)
    driver.remove(gone)
    driver.run(NUM_OUTPUTS, wait=False)
    for sequence in sequences:
        check(sequence, "mamba2")
    [first, last] = sequences
    keep_state(driver, first, 16, 0)
    driver.remove(last)
    keep_state(driver, first, 24, 1)
    driver.drain()
    known = [*first.prompt, *first.outputs]
    resumed = [driver.resume(n, first.blocks[: 4 + 2 * n], [*known[: 16 + 8 * n], 3, 5]) for n in (0, 1, 1)]
    driver.run(NUM_OUTPUTS, wait=False)
    for sequence in (first, *resumed):
        check(sequence, "mamba2")


def test_a_steps_states_are_gone_with_the_next_without_the_collector() -> None:
    driver = make_driver("qwen3_next")
    for length in (4, 9):
        driver.add(prompt_of(length))
    driver.run(1)
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(5):
            driver.step()
        after = mx.get_active_memory()
    finally:
        gc.enable()
    states = driver.runner._forward._store._batches[0].states  # type: ignore[attr-defined]
    assert after - before < sum(array.nbytes for layer in states for array in layer)


def test_half_precision_passes_the_self_check() -> None:
    half = tiny_model("qwen3_5")
    half.set_dtype(mx.bfloat16)
    runner = Runner(half, num_blocks=40, block_size=4, max_num_seqs=4, dtype=mx.bfloat16)
    assert runner.self_check() == []
    assert runner.attention_name == "gather"


@pytest.mark.parametrize(("name", "instead"), [("lfm2", ["gather", "mlx-lm"]), ("mamba", ["mlx-lm"])])
def test_states_that_are_wrong_are_left_to_mlx_lm(
    monkeypatch: pytest.MonkeyPatch, name: str, instead: list[str]
) -> None:
    take = StateStore.take

    def wrong(self: StateStore, slots: list[int], num_rows: int) -> States:
        return [[array * 0 for array in layer] for layer in take(self, slots, num_rows)]

    driver = make_driver(name)
    runner = driver.runner
    assert runner.self_check() == []
    assert not runner._forward._store._batches  # type: ignore[attr-defined]
    monkeypatch.setattr(StateStore, "take", wrong)
    assert [warning.rpartition("using ")[2] for warning in runner.self_check()] == [
        f"{better} instead" for better in instead
    ]
    sequence = driver.add(prompt_of(9))
    driver.run(NUM_OUTPUTS)
    check(sequence, name)


def test_copied_blocks_have_no_state() -> None:
    driver = make_driver("lfm2")
    source = driver.add(prompt_of(7))
    driver.run(1)
    driver.fork(source)
    with pytest.raises(ValueError, match="no state"):
        driver.step()


def test_a_state_that_grows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_model("lfm2")
    mixer = type(tiny.layers[0].conv)
    convolve = mixer.__call__

    def growing(self: nn.Module, x: mx.array, mask: object = None, cache: object = None) -> mx.array:
        before = cache[0]  # type: ignore[index]
        output: mx.array = convolve(self, x, mask, cache)
        if before is not None:
            cache[0] = mx.concatenate([before, x], axis=1)  # type: ignore[index]
        return output

    monkeypatch.setattr(mixer, "__call__", growing)
    with pytest.raises(UnsupportedModelError, match="does not keep its shape and type"):
        check_supported(tiny)


class TestStateStore:
    @staticmethod
    def states(*rows: float) -> States:
        return [[mx.array(rows)[:, None], mx.array(rows)[:, None, None] * 10]]

    @staticmethod
    def rows(states: States) -> list[float]:
        [[first, second]] = states
        assert mx.array_equal(first[:, 0] * 10, second[:, 0, 0])
        return first[:, 0].tolist()  # type: ignore[return-value]

    @pytest.fixture
    def store(self) -> StateStore:
        [states] = check_supported(model("lfm2")).states[:1]
        return StateStore([states * 2], 2)

    def test_rows_that_run_together_again_are_not_copied(self, store: StateStore) -> None:
        states = self.states(1, 2, 3)
        store.put([7, 0, 4], states)
        assert store.take([7, 0, 4], 3) is states
        padded = self.states(1, 2, 9)
        store.put([7, 0], padded)
        assert store.take([7, 0], 3) is padded
        assert self.rows(store.take([7, 0], 2)) == [1, 2]

    def test_rows_come_from_wherever_they_ran(self, store: StateStore) -> None:
        store.put([1, 2, 3], self.states(1, 2, 3))
        store.put([4], self.states(4))
        assert self.rows(store.take([3, 1, 4, 2], 6)) == [3, 1, 4, 2, 2, 2]

    def test_those_left_behind_take_their_rows_along(self, store: StateStore) -> None:
        store.put([1, 2, 3], self.states(1, 2, 3))
        computed = store.put([1, 3], self.states(10, 30))
        assert len(computed) == 4
        batch = store._batches[2]
        assert batch.num_rows == 1 and batch.rows == {2: 0}
        assert self.rows(store.take([1, 2, 3], 3)) == [10, 2, 30]

    def test_a_saved_state_stays_what_it_was(self, store: StateStore) -> None:
        store.put([1, 2], self.states(1, 2))
        saved = store.save(2, 0)
        assert [array.shape[0] for array in saved] == [1, 1]
        store.put([1, 2], self.states(10, 20))
        store.release(2)
        store.load(0, 5)
        store.load(0, 6)
        store.put([6], self.states(60))
        assert self.rows(store.take([1, 5, 6], 3)) == [10, 2, 60]
        store.save(1, 0)
        assert self.rows(store.take([5], 1)) == [2]
        store.load(0, 5)
        assert self.rows(store.take([5], 1)) == [10]

    def test_a_saved_state_keeps_no_more_than_itself(self, store: StateStore) -> None:
        """Models hand over the ends of longer arrays."""
        before = mx.get_active_memory()
        long = mx.ones((1, 1 << 16, 8))
        store.put([1], [[long[:, -2:], long[:, -2:] * 2]])
        mx.eval(store.save(1, 0))
        store.release(1)
        del long
        assert mx.get_active_memory() - before < 1 << 12

    def test_there_are_no_more_than_were_planned(self, store: StateStore) -> None:
        store.put([1], self.states(1))
        with pytest.raises(ValueError, match="state 2 of 2"):
            store.save(1, 2)

    def test_nothing_is_left_of_a_released_slot(self, store: StateStore) -> None:
        store.put([1, 2], self.states(1, 2))
        store.release(1)
        store.release(1)
        assert self.rows(store.take([2], 1)) == [2]
        assert not store.take([1], 1)[0][0].any()
