"""Histograms count by upper bound, several equal values at once, and lose nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd import metrics
from mlxd.metrics import Histogram

BOUNDS = (0.1, 1.0, 10.0)


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram(BOUNDS)
    for value in (0.0, 0.1, 0.1000001, 1.0, 10.0, 10.1):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1, 1]
    assert histogram.cumulative() == [2, 4, 5, 6]
    assert sum(histogram.counts) == 6
    assert histogram.total == pytest.approx(21.3000001)


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 9))))
def test_equal_values_at_once_are_as_one_by_one(pairs: list[tuple[float, int]]) -> None:
    together, alone = Histogram(BOUNDS), Histogram(BOUNDS)
    for value, times in pairs:
        together.observe(value, times)
        for _ in range(times):
            alone.observe(value)
    assert together.counts == alone.counts
    assert together.total == pytest.approx(alone.total)


@pytest.mark.parametrize(
    "name",
    ["WAIT_SECONDS", "TOKEN_SECONDS", "REQUEST_SECONDS", "LAG_SECONDS", "TOKENS", "BATCH_ROWS"],
)
def test_bounds_rise(name: str) -> None:
    bounds = getattr(metrics, name)
    assert list(bounds) == sorted(set(bounds)) and bounds[0] > 0
