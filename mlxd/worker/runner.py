"""The model side of the worker: turns step plans into tokens.

It does not know sockets, files or devices: a loaded model comes in, plans follow, results leave.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxd.step import NULL_BLOCK, StepPlan, StepResult
from mlxd.worker.batch import StepBatch
from mlxd.worker.forward import Forward, PagedForward, SlotForward
from mlxd.worker.grammar import Grammars
from mlxd.worker.hybrid_forward import HybridForward
from mlxd.worker.hybrid_kernels import HybridKernelForward
from mlxd.worker.kernel_forward import KernelForward
from mlxd.worker.kernels.paged import PagedKernels
from mlxd.worker.kv_pool import KvPool
from mlxd.worker.logprobs import PromptTokenLogprobs
from mlxd.worker.patching import patch_head_projections, patch_projection
from mlxd.worker.sampler import Sampled, Sampler
from mlxd.worker.selfcheck import checked_tokens, compare_with_mlx_lm, try_steps
from mlxd.worker.state_store import StateStore
from mlxd.worker.support import UnsupportedModelError, check_supported, kv_bytes_per_token
from mlxd.worker.warmup import StepLimits

__all__ = ["PendingStep", "Runner", "UnsupportedModelError", "check_supported", "kv_bytes_per_token"]

Bytes = npt.NDArray[np.uint8]

OPTIONAL_WARMUP_SECONDS = 5.0
NO_LATENT_KERNEL = "latent attention (MLA) has no kernel: sequences are gathered from the cache at every step"


class PendingStep:
    """A step whose graph is built. `start` hands it to the device once; `result` waits for it."""

    def __init__(
        self,
        step_id: int,
        sampled: Sampled | None,
        arrays: list[mx.array],
        prompt: PromptTokenLogprobs | None = None,
    ) -> None:
        self.step_id = step_id
        self._sampled = sampled
        self._prompt = prompt
        self._arrays = arrays
        self._started = False
        self._tokens: npt.NDArray[np.int32] | None = None
        self.finished = False

    def attach(self, arrays: list[mx.array]) -> None:
        """Have `arrays` computed too, behind this step."""
        if self._started:
            mx.async_eval(arrays)  # type: ignore[no-untyped-call]
        else:
            self._arrays += arrays

    def start(self) -> None:
        if not self._started:
            self._started = True
            mx.async_eval(self._arrays)  # type: ignore[no-untyped-call]

    def tokens(self) -> npt.NDArray[np.int32]:
        """What the step sampled, int32 [S], -1 where a row failed. Waits for it."""
        if self._tokens is None:
            self.start()
            mx.eval(self._arrays)
            self.finished = True
            if self._sampled is None:
                return np.empty(0, dtype="<i4")
            self._tokens = np.array(self._sampled.tokens, dtype="<i4")
            self._tokens[[index for index, _ in self._sampled.errors]] = -1
        return self._tokens

    def result(self) -> StepResult:
        """What the step sampled and found out; times and memory are left to the caller."""
        tokens = self.tokens()
        prompt_logprobs = None if self._prompt is None else self._prompt.result()
        if self._sampled is None:
            return StepResult(self.step_id, b"", prompt_logprobs=prompt_logprobs)
        logprobs = self._sampled.logprobs
        return StepResult(
            self.step_id,
            tokens.tobytes(),
            logprobs=() if logprobs is None else logprobs.result(len(tokens)),
            row_errors=tuple(self._sampled.errors),
            prompt_logprobs=prompt_logprobs,
        )


class Runner:
    """One model with its KV pool and sampler. All calls come from one thread, MLX's."""

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        dtype: mx.Dtype,
        paged: bool = True,
        tokenizer_file: Path | None = None,
        kernels: PagedKernels | None = None,
        num_snapshots: int = 0,
    ) -> None:
        """Allocate the pool: `num_blocks`, NULL_BLOCK included, of `block_size` tokens in `dtype`.

        `paged=False` keeps mlx-lm's own caches, one set a slot, and allocates no pool. `tokenizer_file` is
        the model's tokenizer.json; without it requests that have a grammar fail. `kernels` attend, where
        given, else MLX's operations do. `num_snapshots` of the states of recurrent layers can be kept, where
        there are any. Raises UnsupportedModelError when the model cannot run over the pool.
        """
        self._model = model
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self.vocab_size: int = model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
        self._sampler = Sampler(self.vocab_size, max_num_seqs)
        self._grammars = Grammars(tokenizer_file, self.vocab_size)
        on_cpu = mx.default_device() == mx.cpu
        self._one_at_a_time = on_cpu
        self._newest: PendingStep | None = None
        self._forward: Forward
        self._pool: KvPool | None = None
        self._states = StateStore((), 0)
        self.block_bytes = 0
        self._num_checked_tokens = 0
        self._warnings: list[str] = []
        if paged:
            shapes = check_supported(model, kernels)
            selection = patch_projection(model, self.vocab_size)
            self._pool = pool = KvPool(shapes.layers, num_blocks, block_size, dtype)
            capacity = (num_blocks - 1) * block_size
            self._num_checked_tokens = checked_tokens((shape.window for shape in shapes.layers), capacity)
            self.block_bytes = pool.block_bytes
            latent = any(shape.latent for shape in shapes.layers)
            if latent:
                patch_head_projections(model)
            if kernels is not None and latent:
                self._warnings.append(NO_LATENT_KERNEL)
            # On CPUs MLX multiplies gathered matrices in float32 alone.
            attention = "blockwise" if on_cpu and dtype == mx.float32 else "gather"
            if shapes.states:
                self._states = StateStore(shapes.states, num_snapshots)
            if shapes.states and kernels is not None and not latent:
                self._forward = HybridKernelForward(model, selection, pool, self._states, kernels)
            elif shapes.states:
                self._forward = HybridForward(model, selection, pool, self._states, attention)
            elif kernels is not None and not latent:
                self._forward = KernelForward(model, selection, pool, kernels)
            else:
                self._forward = PagedForward(model, selection, pool, attention)
        else:
            self._forward = SlotForward(model)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a sequence may begin with blocks that others filled."""
        return self._forward.shares_prefixes

    @property
    def num_snapshots(self) -> int:
        """Of states that must be loaded with such blocks; 0 where they suffice, or nothing is shared."""
        return self._states.num_snapshots if self.shares_prefixes else 0

    @property
    def attention_name(self) -> str:
        """kernel, blockwise or gather over the pool, or mlx-lm (its own caches)."""
        return self._forward.name

    def launch(self, plan: StepPlan) -> PendingStep:
        """Build a step and start it. It runs after those launched before; nothing is read back, save by rows
        that have a grammar: the tokens of the step before.

        On a CPU it starts once the one before is finished, with the next launch at the latest. There
        `async_eval` blocks when some hundred operations wait, which would hold back the result of the step
        before; and a pool that a waiting operation still reads is copied by the next step's write.
        """
        previous = self._newest
        if previous is not None:
            previous.start()
        for slot in plan.release:
            self._release(slot)
        for init in plan.admit:
            self._release(init.slot)
            self._sampler.admit(init)
            self._grammars.admit(init)
        for snapshot, slot in plan.load_states:
            self._states.load(snapshot, slot)
        if plan.copy_blocks:
            self._forward.copy_blocks(plan.copy_blocks)
        batch = StepBatch.from_plan(plan)
        slots = batch.slots[batch.sampled_rows]
        sampler = self._sampler
        logits, arrays = self._forward(batch, sampler.last_tokens)
        for slot, snapshot in plan.save_states:
            arrays = [*arrays, *self._states.save(slot, snapshot)]
        sampled = prompt = None
        if batch.prompt_rows and logits is not None:
            prompt = PromptTokenLogprobs(logits[len(slots) :], batch.prompt_rows)
            logits = logits[: len(slots)] if len(slots) else None
            arrays += prompt.arrays
        constrained = self._grammars.constrained(slots)
        if logits is not None:
            if constrained and self._may_start(previous):
                # What these rows may say follows from the step before: the forward runs meanwhile.
                mx.async_eval([logits, *arrays])  # type: ignore[no-untyped-call]
            constraints = {place: row.constraint() for place, row in constrained.items()}
            sampled = sampler.sample(logits, slots, batch.context_lens[batch.sampled_rows], constraints)
            arrays += [sampled.tokens, sampler.last_tokens]
            if sampled.logprobs is not None:
                arrays += sampled.logprobs.arrays
        self._newest = PendingStep(plan.step_id, sampled, arrays, prompt)
        for place, row in constrained.items():
            row.sampled(self._newest, place)
        if self._may_start(previous):  # rows with a grammar have waited for it
            self._newest.start()
        return self._newest

    def _may_start(self, previous: PendingStep | None) -> bool:
        """Whether a step may run behind `previous`."""
        return previous is None or previous.finished or not self._one_at_a_time

    def read_blocks(self, block_ids: Sequence[int]) -> Callable[[], Bytes]:
        """Begin to copy blocks out, as the steps launched so far leave them.

        What comes back waits for the copy: uint8 [n, bytes of a block].
        """
        copied = self._forward.read_blocks(block_ids)
        if self._newest is None:
            mx.async_eval([copied])  # type: ignore[no-untyped-call]
        else:
            self._newest.attach([copied])
        return lambda: np.asarray(copied)

    def write_blocks(self, block_ids: Sequence[int], payload: Bytes) -> None:
        """Overwrite blocks with what `read_blocks` gave, before the next step that is launched.

        The copy is made with that step; but so that waiting copies do not pile up, right now if none runs.
        """
        self._forward.write_blocks(block_ids, mx.array(payload))
        if self._newest is None or self._newest.finished:
            mx.eval(self._forward.read_blocks(block_ids[:1]))

    def warmup(
        self,
        max_model_len: int = 1,
        max_num_batched_tokens: int = 1,
        *,
        transfers: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Run one step of each kind, so that first requests find kernels compiled and memory mapped.

        `max_model_len`: the longest context that a row may have. `max_num_batched_tokens`: the most tokens
        of a step. `transfers`: blocks will be read and written from outside. Rows write to NULL_BLOCK alone.
        Only for a runner that has no request yet.
        """
        limits = StepLimits(self._max_num_seqs, max_model_len, max_num_batched_tokens)
        optional_since: float | None = None
        for step in self._forward.warm_steps(limits):
            if step.optional:
                now = clock()
                optional_since = now if optional_since is None else optional_since
                if now - optional_since > OPTIONAL_WARMUP_SECONDS:
                    continue
            plan = step.plan(self._block_size)
            self.launch(plan).result()
            for init in plan.admit:
                self._release(init.slot)
        if transfers:
            self.write_blocks([NULL_BLOCK], self.read_blocks([NULL_BLOCK])())
        with contextlib.suppress(ValueError):  # the requests that need it will say so
            self._grammars.load()

    def self_check(self, max_model_len: int = 1) -> list[str]:
        """Compare a short prompt's logits with those of mlx-lm's own cache, and fall back where they differ,
        or where a step of the longest context fails.

        `max_model_len`: that context. Returns warnings, also why kernels are not used; empty when all is
        well. Only for a runner that has no request yet.
        """
        warnings = list(self._warnings)
        forward = self._forward
        while (better := forward.fallback()) is not None:
            difference = compare_with_mlx_lm(
                self._model, forward, self._block_size, self.vocab_size, self._num_checked_tokens
            ) or try_steps(forward, forward.long_steps(max_model_len), self._block_size)
            if difference is None:
                break
            warnings.append(f"{forward.name} attention {difference}; using {better.name} instead")
            if self._pool is not None:
                self._pool.clear()
            self._forward = forward = better
        forward.release(0)
        return warnings

    def _release(self, slot: int) -> None:
        self._sampler.release(slot)
        self._grammars.release(slot)
        self._forward.release(slot)
