"""Projections that read the same input, as one matrix product, for steps of few rows.

It does not know kernels or steps. On a GPU a decode step is bound by how many operations the host can hand
out; of a layer's seven matrix products four remain. What a model does between projections and attention is
found out by looking at its modules, and believed only after a comparison with what the model itself computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE

from mlxd.worker.kernels.source import Fusion

PROBE_POSITIONS = (3, 1000, 100_000)
"""far ones too: some models scale queries from some position on"""
TOLERANCES = {2: 0.03, 4: 5e-3}
"""Allowed difference, as a part of the largest number, by the bytes of a number. float32 is TF32 on CUDA."""


class FusedLinear:
    """Linear layers over one input, in one product. Their weights become views of the joint one."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """The layers have passed `can_join`. No more memory is taken than before, once this returns."""
        first = layers[0]
        self._quantised = isinstance(first, nn.QuantizedLinear)
        names = ("weight", "scales", "biases", "bias")
        self._arrays: dict[str, mx.array] = {}
        for name in names:
            if name not in first:
                continue
            joint = mx.concatenate([layer[name] for layer in layers])
            mx.eval(joint)
            start = 0
            for layer in layers:
                stop = start + layer[name].shape[0]
                layer[name] = joint[start:stop]
                start = stop
            mx.eval([layer[name] for layer in layers])
            self._arrays[name] = joint
        self._options = {}
        if self._quantised:
            self._options = {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] -> [..., the sum of all outputs]"""
        arrays = self._arrays
        if self._quantised:
            y = mx.quantized_matmul(
                x,
                arrays["weight"],
                scales=arrays["scales"],
                biases=arrays.get("biases"),
                transpose=True,
                **self._options,
            )
            return y + arrays["bias"] if "bias" in arrays else y
        if "bias" in arrays:
            return mx.addmm(arrays["bias"], x, arrays["weight"].T)
        return x @ arrays["weight"].T


def can_join(layers: Sequence[Any]) -> bool:
    """Whether these are linear layers of one kind over inputs of one size."""
    first = layers[0]
    if type(first) not in (nn.Linear, nn.QuantizedLinear):
        return False
    kinds = {
        (type(layer), "bias" in layer, layer.weight.shape[1], layer.weight.dtype, *_quantisation(layer))
        if isinstance(layer, nn.Module)
        else None
        for layer in layers
    }
    return len(kinds) == 1


def _quantisation(layer: Any) -> tuple[object, ...]:
    if isinstance(layer, nn.QuantizedLinear):
        return layer.group_size, layer.bits, layer.mode, "biases" in layer
    return ()


class Tap:
    """Notes what a module is called with, while `open`."""

    __slots__ = ("input", "open")

    def __init__(self) -> None:
        self.open = False
        self.input: mx.array | None = None

    def listen(self, module: nn.Module) -> None:
        original = type(module).__call__

        def call(module: Any, x: mx.array) -> mx.array:
            if self.open:
                self.input = x
            return original(module, x)  # type: ignore[no-any-return]

        module.__class__ = _subclass(module, call)

    def take(self) -> mx.array:
        x, self.input = self.input, None
        assert x is not None
        return x


@dataclass(frozen=True, slots=True)
class Rotary:
    """The angles of a rotary embedding over all of a head's elements. Layers with equal keys share tables."""

    dims: int
    base: float
    scale: float
    frequencies: mx.array | None = None
    """float32 [dims / 2]: what positions are divided by, instead of base and scale"""

    @property
    def key(self) -> tuple[object, ...]:
        return self.dims, self.base, self.scale, id(self.frequencies)

    def table(self, positions: mx.array) -> mx.array:
        """int32 [N] -> float32 [N, dims]: cosines, then sines"""
        if self.frequencies is None:
            exponents = mx.arange(0, self.dims, 2, dtype=mx.float32) / self.dims
            turns = self.scale * mx.power(self.base, -exponents)
        else:
            turns = 1 / self.frequencies
        angles = positions[:, None].astype(mx.float32) * turns
        return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """A layer's way from its input to queries, keys and values."""

    tap: Tap
    project: FusedLinear
    rotary: Rotary
    fusion: Fusion
    weights: tuple[mx.array, mx.array] | None

    def heads(
        self, x: mx.array, positions: mx.array, num_heads: int, num_kv_heads: int
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x [N, 1, hidden] -> queries, keys and values [N, heads, 1, dim], by MLX's own operations.

        What kernels do in one, for comparison with the model.
        """
        dim = self.rotary.dims
        cuts = [num_heads * dim, (num_heads + num_kv_heads) * dim]
        parts = mx.split(self.project(x), cuts, axis=-1)
        queries, keys, values = (
            part.reshape(len(x), 1, count, -1).swapaxes(1, 2)
            for part, count in zip(parts, (num_heads, num_kv_heads, num_kv_heads), strict=True)
        )
        if self.weights is not None:
            assert self.fusion.epsilon is not None
            queries = mx.fast.rms_norm(queries, self.weights[0], self.fusion.epsilon)
            keys = mx.fast.rms_norm(keys, self.weights[1], self.fusion.epsilon)
        return self._rotate(queries, positions), self._rotate(keys, positions), values

    def _rotate(self, heads: mx.array, positions: mx.array) -> mx.array:
        rotary = self.rotary
        return mx.fast.rope(
            heads,
            rotary.dims,
            traditional=self.fusion.traditional,
            base=None if rotary.frequencies is not None else rotary.base,
            scale=1.0 if rotary.frequencies is not None else rotary.scale,
            offset=positions,
            freqs=rotary.frequencies,
        )


def fuse_attention(layer: nn.Module) -> FusedAttention | None:
    """The fused way into a layer's attention, or None where it has another one.

    Afterwards the layer computes what it did before. No array is evaluated but the joint weights and, once, a
    probe of two rows.
    """
    module: Any = next((module for module in layer.modules() if "q_proj" in module), None)
    if module is None:
        return None
    projections = [module.get(name) for name in ("q_proj", "k_proj", "v_proj")]
    rotary = _rotary(getattr(module, "rope", None))
    if rotary is None or None in projections or not can_join(projections):
        return None
    norms = [module.get(name) for name in ("q_norm", "k_norm")]
    epsilon = weights = None
    if norms != [None, None]:
        if any(type(norm) is not nn.RMSNorm or norm.weight.shape != (rotary.dims,) for norm in norms):
            return None
        if norms[0].eps != norms[1].eps:
            return None
        epsilon, weights = norms[0].eps, (norms[0].weight, norms[1].weight)
    fused = FusedAttention(
        tap=Tap(),
        project=FusedLinear(projections),
        rotary=rotary,
        fusion=Fusion(bool(module.rope.traditional), epsilon),
        weights=weights,
    )
    fused.tap.listen(module.q_proj)
    return fused if _agrees(module, fused) else None


def _rotary(rope: Any) -> Rotary | None:
    if type(rope) is nn.RoPE:
        return Rotary(rope.dims, float(rope.base), float(rope.scale))
    if type(rope) is Llama3RoPE:
        return Rotary(rope.dims, 0.0, 1.0, rope._freqs)
    return None


class _Probe:
    """Stands where a layer's cache will be; keeps what attention is called with."""

    def __init__(self) -> None:
        self.offset = mx.array(PROBE_POSITIONS, dtype=mx.int32)
        self.heads: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **_: object) -> mx.array:
        self.heads = [queries, keys, values]
        return mx.zeros((*queries.shape[:-1], values.shape[-1]), dtype=queries.dtype)


def _agrees(module: Any, fused: FusedAttention) -> bool:
    """Whether a random input gives the queries, keys and values that the model's own code gives."""
    weight = module.q_proj.weight
    quantised = isinstance(module.q_proj, nn.QuantizedLinear)
    size = weight.shape[1] * 32 // module.q_proj.bits if quantised else weight.shape[1]
    dtype = module.q_proj.scales.dtype if quantised else weight.dtype
    x = mx.random.normal((len(PROBE_POSITIONS), 1, size), key=mx.random.key(0)).astype(dtype)
    probe = _Probe()
    try:
        module(x, None, probe)
        if not probe.heads:
            return False
        queries, keys, _ = probe.heads
        theirs = fused.heads(x, probe.offset, queries.shape[1], keys.shape[1])
        if any(a.shape != b.shape for a, b in zip(probe.heads, theirs, strict=True)):
            return False
        errors = mx.stack(
            [
                mx.max(mx.abs(a.astype(mx.float32) - b.astype(mx.float32))) / mx.max(mx.abs(b))
                for a, b in zip(probe.heads, theirs, strict=True)
            ]
        )
        return bool((mx.max(errors) <= TOLERANCES[queries.dtype.size]).item())
    except (TypeError, ValueError, AttributeError):
        # This attention is called in another way, or does not fit the shapes.
        return False


class FusedPair:
    """Two linear layers called with one input, one after the other: a single product, while `open`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.open = False
        self._outputs: list[mx.array] = []
        split = layers[0].weight.shape[0]
        self._joint = FusedLinear(layers)
        for index, layer in enumerate(layers):
            layer.__class__ = _subclass(layer, self._part(index, type(layer).__call__, split))

    def _part(self, index: int, original: Callable[..., mx.array], split: int) -> Callable[..., mx.array]:
        def call(module: Any, x: mx.array) -> mx.array:
            if not self.open:
                return original(module, x)
            if index == 0:
                joint = self._joint(x)
                self._outputs = [joint[..., split:]]
                return joint[..., :split]
            return self._outputs.pop()

        return call


def fuse_mlp(layer: nn.Module) -> FusedPair | None:
    """Gate and up projection of a layer as one product, or None where it has no such pair.

    Only where the model calls them in that order with one input, which a call on a random one shows.
    """
    module: Any = next((module for module in layer.modules() if "gate_proj" in module), None)
    if module is None:
        return None
    layers = [module.get("gate_proj"), module.get("up_proj")]
    if None in layers or not can_join(layers):
        return None
    quantised = isinstance(layers[0], nn.QuantizedLinear)
    size = layers[0].weight.shape[1] * 32 // layers[0].bits if quantised else layers[0].weight.shape[1]
    dtype = layers[0].scales.dtype if quantised else layers[0].weight.dtype
    x = mx.random.normal((2, 1, size), key=mx.random.key(0)).astype(dtype)
    try:
        expected = module(x)
    except (TypeError, ValueError):
        return None
    mx.eval(expected)
    pair = FusedPair(layers)
    pair.open = True
    try:
        error = mx.max(mx.abs((module(x) - expected).astype(mx.float32))) / mx.max(mx.abs(expected))
        agrees = bool((error <= TOLERANCES[expected.dtype.size]).item())
    except (IndexError, TypeError, ValueError):
        agrees = False
    pair.open = False
    return pair if agrees else None


def _subclass(module: nn.Module, call: Callable[..., mx.array]) -> type:
    cls = type(module)
    return type(cls.__name__, (cls,), {"__call__": call})
