"""The uniform numbers: pinned, so that a replay by another version repeats them, and uniform."""

from __future__ import annotations

import numpy as np
import pytest

from mlxd.worker.randomness import uniforms

PINNED = [0.6524484753608704, 0.7012121081352234, 0.943564236164093, 0.4984167218208313]


def test_numbers_are_pinned() -> None:
    positions = np.array([0, 1, 1, 2**31 - 1], dtype=np.int32)
    assert [float(u) for u in uniforms([0, 0, 1, -1], positions)] == PINNED


def test_a_number_depends_on_its_own_seed_and_position_alone() -> None:
    seeds, positions = [3, 2**63, 5], np.array([7, 8, 9], dtype=np.int32)
    together = uniforms(seeds, positions)
    alone = [uniforms([seed], positions[i : i + 1])[0] for i, seed in enumerate(seeds)]
    assert together.tolist() == alone
    assert uniforms([1 << 64], positions[:1]) == uniforms([0], positions[:1])


@pytest.mark.parametrize("what", ["seeds", "positions"])
def test_numbers_are_uniform_and_unrelated(what: str) -> None:
    count = 100_000
    line = range(count)
    if what == "seeds":
        numbers = uniforms(line, np.zeros(count, dtype=np.int32))
    else:
        numbers = uniforms([0] * count, np.arange(count, dtype=np.int32))
    assert numbers.min() >= 0 and numbers.max() < 1
    cells = np.bincount((numbers * 100).astype(int), minlength=100)
    statistic = ((cells - count / 100) ** 2 / (count / 100)).sum()
    assert abs(statistic - 99) < 4 * np.sqrt(2 * 99)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / np.sqrt(count)
