"""Steps through models with recurrent state with our own attention kernels; decode rows as compiled graphs.

It does not know sampling, or what a state is. Chunks are not compiled: a graph belongs to one length, and
tokens that fill up, as other models have them, would become part of the state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlxd.worker.attention.kernel import StepRows
from mlxd.worker.attention.layout import StepLayout
from mlxd.worker.batch import StepBatch
from mlxd.worker.hybrid_forward import NO_ATTENTION, NO_COPIES, HybridForward, run_model, run_part, run_parts
from mlxd.worker.kernel_forward import KernelForward, pack_decode, unpack_decode
from mlxd.worker.kernels.paged import PagedKernels
from mlxd.worker.kv_pool import KvPool
from mlxd.worker.patching import RowSelection
from mlxd.worker.state_store import States, StateStore
from mlxd.worker.warmup import StepLimits, WarmStep

DecodeStep = Callable[[mx.array, mx.array, mx.array, States], tuple[mx.array, mx.array, States]]


class HybridKernelForward(KernelForward):
    """Over the paged pool and a store of states. A row's sequence begins at position 0, or where a state that
    was saved does."""

    def __init__(
        self,
        model: nn.Module,
        selection: RowSelection,
        pool: KvPool,
        store: StateStore,
        kernels: PagedKernels,
    ) -> None:
        super().__init__(model, selection, pool, kernels, one_token_rows=False)
        if not pool.layers:
            self.name = NO_ATTENTION
        self.shares_prefixes = store.num_snapshots > 0
        self._store = store
        self._decode_steps: dict[tuple[int, int], DecodeStep] = {}

    def fallback(self) -> HybridForward:
        """The same model and pool, by gathering."""
        return HybridForward(self._model, self._selection, self._pool, self._store, "gather")

    def warm_steps(self, limits: StepLimits) -> Iterator[WarmStep]:
        """Those of other models, whose blocks are copied too, and whose steps with chunks are compiled."""
        for step in super().warm_steps(limits):
            if not step.optional:
                yield replace(step, copies=False)

    def release(self, slot: int) -> None:
        self._store.release(slot)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        raise ValueError(NO_COPIES)

    def __call__(self, batch: StepBatch, last_tokens: mx.array) -> tuple[mx.array | None, list[mx.array]]:
        def run(part: StepBatch, before: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
            return self._chunk(part, before) if part.chunks else self._decode(part, last_tokens)

        logits, arrays = run_parts(batch, self._pool.block_size, run)
        return logits, [*arrays, self._after]

    def _decode(self, part: StepBatch, last_tokens: mx.array) -> tuple[mx.array, list[mx.array]]:
        packed, num_rows = pack_decode(part, self._pool.block_size, len(last_tokens) - 1)
        max_context = self._context_class(num_rows, int(part.context_lens.max()))
        step = self._decode_steps.get((num_rows, max_context))
        if step is None:
            step = mx.compile(functools.partial(self._decode_step, num_rows, max_context))
            self._decode_steps[num_rows, max_context] = step
        slots = part.slots.tolist()
        states = self._store.take(slots, num_rows)
        logits, self._after, states = step(mx.array(packed), last_tokens, self._after, states)
        return logits[: len(slots)], self._store.put(slots, states)

    def _decode_step(
        self,
        num_rows: int,
        max_context: int,
        packed: mx.array,
        last_tokens: mx.array,
        after: mx.array,
        states: States,
    ) -> tuple[mx.array, mx.array, States]:
        slots, rows = unpack_decode(packed, num_rows, max_context)
        with self._begin(rows, after) as order:
            logits, states = run_model(self._model, last_tokens[slots][:, None], self._layers, states)
        return logits.squeeze(1), order.done, states

    def _chunk(self, part: StepBatch, before: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        layout = StepLayout.of(
            part,
            self._pool.block_size,
            self._context_class,
            pad=False,
            tile_class=self._tile_class if self._prefill else None,
        )
        rows = StepRows.of(layout.shape, layout.shape.unpack(mx.array(layout.packed)), self._dtype)
        tokens = mx.array(part.token_ids)[None]
        if before:
            tokens = mx.depends(tokens, before)
        with self._begin(rows, self._after) as order:
            output = run_part(self._model, self._selection, self._store, part, tokens, self._layers)
        self._after = order.done
        return output
