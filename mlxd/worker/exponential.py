"""exp for numbers that are not positive, at the speed of the machine.

It does not know who needs it: attention weights and token probabilities are both exp(x - max).

mlx-cpu's exp is scalar code, 20 ns a number: half of a decode step's attention, and 33 ms for 32 rows of a
49k vocabulary. This one is additions and multiplications, which are vector code everywhere. Its relative
error is below 3e-7. On other devices MLX's own is used.
"""

from __future__ import annotations

import functools
import math

import mlx.core as mx

_LOG2_E = math.log2(math.e)
_LOWEST = -87.0
"""Less counts as this, 1.6e-38: nothing beside the 1 that the largest number gives."""
_ROUND = 1.5 * 2.0**23
"""A float32 this large has no fraction bits, so adding it rounds, and the low bits are the integer."""
_MANTISSA_BITS = 23
_LN_2 = (0.693359375, -2.12194440054690583e-4)
"""ln 2 in two parts, the first of so few bits that n times it is exact (Cody and Waite, 1980)."""
_POLYNOMIAL = (0.00826146229, 0.0418989627, 0.166681171, 0.499991393, 0.99999953, 1)
"""exp(f) for |f| <= ln(2) / 2, highest power first: a fit of the relative error, which it leaves at 1e-7."""


def exp_nonpositive(x: mx.array) -> mx.array:
    """exp(x) for float32 x <= 0, NaN for NaN."""
    if mx.default_device() != mx.cpu:
        return mx.exp(x)
    shifted, result = _polynomial(x)
    # The low bits of `shifted` are n: shifted up, they add to the exponent of exp(f).
    exponent = mx.left_shift(shifted.view(mx.int32), mx.array(_MANTISSA_BITS, dtype=mx.int32))
    return (result.view(mx.int32) + exponent).view(mx.float32)


@functools.partial(mx.compile, shapeless=True)
def _polynomial(x: mx.array) -> tuple[mx.array, mx.array]:
    """exp(x) = 2**n * exp(f), n the integer nearest to x / ln(2): n + _ROUND, and exp(f)."""
    x = mx.maximum(x, _LOWEST)
    shifted = x * _LOG2_E + _ROUND
    power = shifted - _ROUND
    fraction = x - power * _LN_2[0] - power * _LN_2[1]
    result = fraction * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for coefficient in _POLYNOMIAL[2:]:
        result = result * fraction + coefficient
    return shifted, result
