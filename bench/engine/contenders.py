"""The three that decode: mlxd's Runner, mlx-lm's bare model step, mlx-lm's BatchGenerator; and prefill.

They do not know what they are compared for. `steps(n)` runs n steps and gives the seconds of each, from one
step's tokens to the next's. Import this only after `mlxd.worker.platform.prepare()`.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from bench.engine.plans import BLOCK_SIZE, TOKEN, Plans
from mlxd.step import SamplingParams, StepPlan
from mlxd.worker.kernels.paged import gpu_kernels
from mlxd.worker.platform import Device
from mlxd.worker.runner import Runner
from mlxd.worker.support import layer_shapes

clock = time.perf_counter


class Contender(Protocol):
    def steps(self, count: int) -> list[float]: ...


def share(model: nn.Module) -> nn.Module:
    """A second model over the same arrays, so that what the Runner changes in one is not in the other."""
    arrays = {id(array): array for _, array in tree_flatten(model.parameters())}
    return copy.deepcopy(model, arrays)


class MlxdDecode:
    """The Runner with a row at each of `contexts` tokens, on `device` as its worker would run it.

    Rows are greedy but for the first, which have `sampling`. `launch_seconds`: the host's part of each step
    counted so far.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: mx.Dtype,
        contexts: Sequence[int],
        max_steps: int,
        max_chunk: int = 0,
        *,
        device: Device,
        sampling: Sequence[SamplingParams] = (),
        tokenizer_file: Path | None = None,
    ) -> None:
        self.plans = Plans(contexts=contexts, max_steps=max_steps, max_chunk=max_chunk, sampling=sampling)
        self.launch_seconds: list[float] = []
        self.runner = Runner(
            share(model),
            num_blocks=self.plans.num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=self.plans.max_num_seqs,
            dtype=dtype,
            tokenizer_file=tokenizer_file,
            kernels=gpu_kernels(device, dtype),
        )
        self.runner.launch(self.plans.admit()).result()

    def steps(self, count: int, *, chunk: int = 0) -> list[float]:
        """`chunk`: tokens of a new prompt in each step."""
        return self.run([self.plans.decode(chunk) for _ in range(count + 2)])

    def chunks(self, count: int, length: int, context: int = 0) -> list[float]:
        """Seconds of a step that is `length` tokens of a prompt behind `context`; each is waited for."""
        seconds = []
        for _ in range(count):
            plan = self.plans.chunk(length, context)
            start = clock()
            self.runner.launch(plan).result()
            seconds.append(clock() - start)
        return seconds

    def run(self, plans: list[StepPlan]) -> list[float]:
        """One step in flight, as in mlxd.worker.main; the first and last are not counted.

        MLX lets only so many operations queue up, so on a CPU a launch may take as long as the step: each
        figure must hold one launch and one wait.
        """
        pending = self.runner.launch(plans[0])
        times = []
        for plan in plans[1:]:
            start = clock()
            following = self.runner.launch(plan)
            self.launch_seconds.append(clock() - start)
            pending.result()
            times.append(clock())
            pending = following
        pending.result()
        return [end - start for start, end in itertools.pairwise(times)]


class RawDecode:
    """mlx-lm's model over its BatchKVCache, and an argmax. Shorter rows are padded, as it does that."""

    def __init__(self, model: nn.Module, dtype: mx.Dtype, contexts: Sequence[int]) -> None:
        self._model = model
        longest, batch = max(contexts), len(contexts)
        padding = [longest - context for context in contexts]
        self._cache = [BatchKVCache(padding) for _ in layer_shapes(model)]
        for cache, keys, values in zip(self._cache, *_zeros(model, dtype, batch, longest), strict=True):
            cache.update_and_fetch(keys, values)
            mx.eval(cache.keys, cache.values)
        self._tokens = mx.full((batch,), TOKEN, dtype=mx.int32)

    def steps(self, count: int) -> list[float]:
        current = self._step(self._tokens)
        times = []
        for _ in range(count + 1):
            following = self._step(current)
            mx.eval(current)
            times.append(clock())
            current = following
        mx.eval(current)
        self._tokens = current
        return [end - start for start, end in itertools.pairwise(times)]

    def _step(self, tokens: mx.array) -> mx.array:
        logits = self._model(tokens[:, None], cache=self._cache)
        following = mx.argmax(logits[:, -1], axis=-1)
        mx.async_eval(following)
        return following


class GeneratorDecode:
    """mlx-lm's BatchGenerator, greedy, without stop tokens."""

    def __init__(self, model: nn.Module, dtype: mx.Dtype, batch: int, context: int) -> None:
        self._generator = BatchGenerator(model, completion_batch_size=batch)
        self._batch = batch
        caches = [_filled_cache(model, dtype, context) for _ in range(batch)]
        self._generator.insert([[TOKEN]] * batch, max_tokens=[1 << 30] * batch, caches=caches)
        while len(self._generator.next_generated()) < batch:
            pass

    def steps(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = clock()
            self._generator.next_generated()
            seconds.append(clock() - start)
        return seconds

    def close(self) -> None:
        self._generator.close()


def raw_prefill(model: nn.Module, length: int, count: int) -> list[float]:
    """Seconds of a prompt of `length` tokens as mlx-lm's generate_step does it, to the first token."""
    seconds = []
    prompt = mx.full((1, length), TOKEN, dtype=mx.int32)
    for _ in range(count):
        start = clock()
        cache = make_prompt_cache(model)
        if length > 1:
            model(prompt[:, :-1], cache=cache)
            mx.eval([layer.state for layer in cache])
        mx.eval(mx.argmax(model(prompt[:, -1:], cache=cache)[:, -1], axis=-1))
        seconds.append(clock() - start)
    return seconds


def _zeros(
    model: nn.Module, dtype: mx.Dtype, batch: int, context: int
) -> tuple[list[mx.array], list[mx.array]]:
    """Keys and values [batch, num_kv_heads, context, dim] of each layer."""
    shapes = layer_shapes(model)
    keys = [mx.zeros((batch, s.num_kv_heads, context, s.key_dim), dtype=dtype) for s in shapes]
    values = [mx.zeros((batch, s.num_kv_heads, context, s.value_dim), dtype=dtype) for s in shapes]
    return keys, values


def _filled_cache(model: nn.Module, dtype: mx.Dtype, context: int) -> list[Any]:
    caches: list[Any] = []
    for keys, values in zip(*_zeros(model, dtype, 1, context), strict=True):
        caches.append(KVCache())
        caches[-1].update_and_fetch(keys, values)
    return caches
