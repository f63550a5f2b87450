"""Loads a model folder into MLX arrays of the right type, layer by layer.

It does not know where the folder came from (model_source.py) or what runs on the model (runner.py).

On CPUs quantised and half-precision products are scalar code (0.2 tokens/s), so there everything becomes
float32. That is done a module at a time: the peak is the result plus one module, and progress moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxd.config import ModelConfig
from mlxd.errors import ConfigError
from mlxd.step import Progress
from mlxd.worker.model_cache import Report
from mlxd.worker.model_facts import read_config

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
PLAIN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose parameters are in memory."""

    model: nn.Module
    config: dict[str, Any]
    """config.json"""
    dtype: mx.Dtype
    """what it computes in; keys and values are kept in it"""
    weights_bytes: int

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model whose parameters have shapes and types but are not read from disk yet."""

    model: nn.Module
    config: dict[str, Any]
    cast_to: mx.Dtype | None
    """None: every parameter keeps its type"""
    dequantise: bool

    @property
    def dtype(self) -> mx.Dtype:
        """What it will compute in."""
        return self.cast_to or usual_dtype(self.model)

    def weights_bytes(self) -> int:
        """What the parameters will take once they are loaded."""
        total = 0
        for _, module in self.model.named_modules():
            arrays = own_arrays(module)
            if self.dequantise and type(module) in PLAIN_CLASSES:
                total += arrays.pop("weight").size * 32 // module.bits * self.dtype.size
                arrays.pop("scales")
                arrays.pop("biases", None)
            for array in arrays.values():
                cast = self.cast_to is not None and mx.issubdtype(array.dtype, mx.floating)
                total += array.size * self.dtype.size if cast else array.nbytes
        return total

    def load(self, report: Report) -> LoadedModel:
        """Reads the weights."""
        materialise(self.model, self.cast_to, self.dequantise, report)
        weights_bytes = sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))
        return LoadedModel(self.model, self.config, self.dtype, weights_bytes)


ModelClasses = Callable[[dict[str, Any]], tuple[type[nn.Module], Any]]
"""From config.json to a model's class and that of its arguments. ValueError: not supported."""


def open_model(
    folder: Path,
    options: ModelConfig,
    device_kind: str,
    model_classes: ModelClasses = mlx_lm_utils._get_classes,
) -> Skeleton:
    """Builds the model for a device of kind metal, cuda or cpu. ConfigError: another try can't mend it."""
    on_cpu = device_kind == "cpu"
    config = read_config(folder)
    cast_to = DTYPES.get(options.dtype, mx.float32 if on_cpu else None)
    name = options.path or folder.name
    try:
        model, config = mlx_lm_utils.load_model(
            folder,
            lazy=True,
            strict=True,
            get_model_classes=model_classes,
            trust_remote_code=options.trust_remote_code,
        )
    except FileNotFoundError:
        raise ConfigError(f"the model {name!r} has no model*.safetensors files") from None
    except ValueError as error:
        reason = str(error)
        if reason.startswith("Model type"):
            raise ConfigError(
                f"the model {name!r} has the architecture {config['model_type']!r}, which mlx-lm cannot load"
            ) from None
        if "trust_remote_code" in reason:
            raise ConfigError(
                f"the model {name!r} runs code of its own: set model.trust_remote_code if you trust it"
            ) from None
        first_line = reason.splitlines()[0] if reason else "no reason given"
        raise ConfigError(f"the model {name!r} cannot be loaded: {first_line:.200}") from error
    except (TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"the model {name!r} cannot be loaded: files are damaged or missing ({type(error).__name__})"
        ) from error
    return Skeleton(model, config, cast_to, dequantise=on_cpu)


def usual_dtype(model: nn.Module) -> mx.Dtype:
    """The type that most of the floating-point parameters have (quantised modules: their scales)."""
    sizes: Counter[mx.Dtype] = Counter()
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] += array.size
    return sizes.most_common(1)[0][0] if sizes else mx.float32


def materialise(model: nn.Module, dtype: mx.Dtype | None, dequantise: bool, report: Report) -> None:
    """Reads every parameter, module by module; casts floating-point ones to `dtype` unless it is None."""
    keep = getattr(model, "cast_predicate", None)
    names = [name for name, module in model.named_modules() if own_arrays(module)]
    for done, name in enumerate(names):
        report(Progress("load", done, len(names), "modules"))
        module = find_module(model, name)
        if dequantise and dtype is not None and (plain := dequantised(module, dtype)) is not None:
            model.update_modules(tree_unflatten([(name, plain)]))
            module = plain
        arrays = own_arrays(module)
        if dtype is not None:
            for key, array in arrays.items():
                if wants_cast(array, dtype) and (keep is None or keep(f"{name}.{key}")):
                    arrays[key] = array.astype(dtype)
            module.update(arrays)
        mx.eval(arrays)
    # Arrays that modules keep in lists or dicts of their own.
    if dtype is not None:
        model.update(
            tree_unflatten(
                [
                    (name, array.astype(dtype))
                    for name, array in tree_flatten(model.parameters())
                    if wants_cast(array, dtype) and (keep is None or keep(name))
                ]
            )
        )
    mx.eval(model.parameters())
    report(Progress("load", len(names), len(names), "modules"))


def wants_cast(array: mx.array, dtype: mx.Dtype) -> bool:
    return mx.issubdtype(array.dtype, mx.floating) and array.dtype != dtype


def own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """Parameters that the module holds itself, not through a child."""
    return {k: v for k, v in module.items() if isinstance(v, mx.array) and not k.startswith("_")}


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name as named_modules gives it."""
    module: Any = model
    for part in name.split(".") if name else ():
        module = module[int(part)] if isinstance(module, list) else module[part]
    assert isinstance(module, nn.Module)
    return module


def dequantised(module: nn.Module, dtype: mx.Dtype) -> nn.Module | None:
    """A plain module with the same weights in `dtype`, not evaluated; None if the module is not quantised.

    Floating-point scales are widened first, so that the weights are not rounded to half precision between.
    """
    plain_class = PLAIN_CLASSES.get(type(module))
    if plain_class is None:
        return None
    scales, biases = module.scales, module.get("biases")
    if mx.issubdtype(scales.dtype, mx.floating):
        scales = scales.astype(dtype)
        biases = None if biases is None else biases.astype(dtype)
    weight = mx.dequantize(
        module.weight,
        scales,
        biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
    # The constructor's random weight is never evaluated, so it costs nothing.
    takes_bias = plain_class in (nn.Linear, SwitchLinear)
    plain = plain_class(*weight.shape[::-1], **({"bias": "bias" in module} if takes_bias else {}))
    plain.weight = weight.astype(dtype)
    if "bias" in module:
        plain.bias = module.bias
    return plain
