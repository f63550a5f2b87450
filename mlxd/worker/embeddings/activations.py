"""Activation functions by the names that configurations use.

They do not know models.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

Activation = Callable[[mx.array], mx.array]

# Abramowitz & Stegun, Handbook of Mathematical Functions, 7.1.28: erf(x) = 1 - 1 / (1 + a1 x + … + a6 x^6)^16
# for x >= 0, off by at most 3e-7.
_ERF = (0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638)
_ERF_OF_HALF = tuple(a / math.sqrt(2) ** power for power, a in enumerate(_ERF, 1))
"""the same for erf(x / sqrt(2))"""


def gelu(x: mx.array) -> mx.array:
    """x * (1 + erf(x / sqrt(2))) / 2.

    MLX's CPU device takes 40 ns for each erf; the polynomial's multiplications take 6 together.
    """
    if mx.default_device() != mx.cpu:
        return nn.gelu(x)
    magnitude = mx.abs(x)
    power = magnitude * _ERF_OF_HALF[-1]
    for coefficient in _ERF_OF_HALF[-2::-1]:
        power = (power + coefficient) * magnitude
    power = power + 1
    for _ in range(4):
        power = power * power
    # x erf(x) = |x| erf(|x|); where the power overflows, its inverse is the 0 that it should be.
    return 0.5 * (x + magnitude - magnitude / power)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": mx.tanh,
    "sigmoid": mx.sigmoid,
    "identity": lambda x: x,
}


def activation(name: str) -> Activation:
    """By its name in a configuration, which may be that of a torch class. ValueError: unknown."""
    found = ACTIVATIONS.get(name.rpartition(".")[2].lower())
    if found is None:
        raise ValueError(f"the activation {name!r} is not supported")
    return found
