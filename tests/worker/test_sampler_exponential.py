"""Our exp against numpy's, over its whole domain."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxd.worker.exponential import exp_nonpositive


def test_it_is_numpys() -> None:
    x = -np.concatenate([np.linspace(0, 87, 100_001), np.geomspace(1e-30, 87, 1001)]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(np.array(exp_nonpositive(mx.array(x))), expected, rtol=3e-7)


def test_it_is_exact_at_zero_negligible_far_below_and_keeps_what_is_not_a_number() -> None:
    values = np.array(exp_nonpositive(mx.array([0.0, -0.0, -88.0, -1e30, -np.inf, np.nan])))
    assert values[:2].tolist() == [1, 1]
    assert (values[2:5] < 2e-38).all()
    assert np.isnan(values[5])


def test_every_shape_is_taken() -> None:
    for shape in [(1,), (3, 5), (2, 3, 4, 5, 6)]:
        assert np.array(exp_nonpositive(mx.zeros(shape))).tolist() == np.ones(shape).tolist()
