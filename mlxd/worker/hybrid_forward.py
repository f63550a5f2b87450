"""Steps through models some or all of whose layers keep a state of a sequence: recurrent, convolutional.

It does not know sampling, or what a state is. Such layers take a sequence's tokens in order and side by side,
so a step is several forwards: the decode rows [B, 1], then each chunk [1, T]. Attention layers see the pool
through a `RowsView` then, as rows of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlxd.worker.attention import StepAttention
from mlxd.worker.batch import Int32s, StepBatch
from mlxd.worker.cache_tree import leaves, with_leaves
from mlxd.worker.forward import PagedForward, SlotForward
from mlxd.worker.kv_pool import KvPool, LatentCache
from mlxd.worker.patching import RowSelection
from mlxd.worker.rows_view import LatentRowsView, RowsView
from mlxd.worker.state_store import States, StateStore

NO_ATTENTION = "recurrent"
"""the name of forwards through models without attention layers"""
NO_COPIES = "a copied block would have no state beside it"


class HybridForward(PagedForward):
    """Over the paged pool and a store of states. A row's sequence begins at position 0, or where a state that
    was saved does."""

    def __init__(
        self,
        model: nn.Module,
        selection: RowSelection,
        pool: KvPool,
        store: StateStore,
        attention: str,
    ) -> None:
        super().__init__(model, selection, pool, attention if pool.layers else NO_ATTENTION)
        self.shares_prefixes = store.num_snapshots > 0
        self._attention = attention
        self._store = store

    def fallback(self) -> PagedForward | SlotForward:
        """Gather for blockwise, mlx-lm's own caches for gather."""
        if self.name in ("gather", NO_ATTENTION):
            return SlotForward(self._model)
        return HybridForward(self._model, self._selection, self._pool, self._store, "gather")

    def release(self, slot: int) -> None:
        self._store.release(slot)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        raise ValueError(NO_COPIES)

    def __call__(self, batch: StepBatch, last_tokens: mx.array) -> tuple[mx.array | None, list[mx.array]]:
        def run(part: StepBatch, before: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
            if part.chunks:
                tokens = mx.array(part.token_ids)[None]
            else:
                tokens = last_tokens[mx.array(part.slots)][:, None]
            if before:
                tokens = mx.depends(tokens, before)
            attention = StepAttention(part, self._pool.block_size, self._attention)
            layers = self._pool.begin_step(attention, part.positions, part.slot_mapping)
            output = run_part(self._model, self._selection, self._store, part, tokens, layers)
            self._pool.end_step()
            return output

        return run_parts(batch, self._pool.block_size, run)


def run_parts(
    batch: StepBatch,
    block_size: int,
    run: Callable[[StepBatch, list[mx.array]], tuple[mx.array, list[mx.array]]],
) -> tuple[mx.array | None, list[mx.array]]:
    """What a Forward gives, of a step's parts. `run` takes one, and what must be computed before it, to what
    `run_part` gives.

    They come one after another: else one writes to a pool that another has yet to read, and MLX copies it.
    """
    logits: list[mx.array] = []
    done: list[mx.array] = []
    for part in batch.parts(block_size):
        output, states = run(part, done)
        if len(part.logit_tokens):
            logits.append(output)
        done = [output, *states]
    # States are not handed out: who keeps them after their step keeps the next one from using their memory.
    if not logits:
        return None, [mx.depends(done[0], done)]
    joined = logits[0] if len(logits) == 1 else mx.concatenate(logits)
    if batch.prompt_rows:
        joined = joined[mx.array(_order(batch))]
    return mx.depends(joined, done), []


def run_part(
    model: nn.Module,
    selection: RowSelection,
    store: StateStore,
    part: StepBatch,
    tokens: mx.array,
    layers: Sequence[Any],
) -> tuple[mx.array, list[mx.array]]:
    """tokens [B, 1] or [1, T] -> the logits [n, vocab_size] of the part's `logit_tokens`, a hidden state
    where there are none, and what else must be computed. `layers` are the pool's, set to the part's rows."""
    slots = part.slots.tolist()
    begins = any(chunk.context_len == chunk.length for chunk in part.chunks)
    rows = mx.array(part.logit_tokens) if len(part.logit_tokens) else None
    selection.select(rows)
    try:
        output, states = run_model(model, tokens, layers, None if begins else store.take(slots, len(slots)))
        selected = selection.used
    finally:
        # The self-check goes on with another forward where this one fails.
        selection.clear()
    if rows is None:
        output = output[:1, :1]
    elif not selected:
        output = output.flatten(0, 1)[rows, None]
    if part.chunks:
        # They are ends of arrays as long as the chunk.
        states = [[mx.contiguous(array) for array in layer] for layer in states]
    return output.squeeze(1), store.put(slots, states)


def run_model(
    model: nn.Module, tokens: mx.array, layers: Sequence[Any], states: States | None
) -> tuple[mx.array, States]:
    """tokens [B, 1] or [1, T], and the states that their rows begin with (None: at the beginning) -> the
    model's output, and new states."""
    caches = make_prompt_cache(model)
    rest, given = iter(layers), iter(states or ())
    new: list[Any] = []
    for cache in leaves(caches):
        if not isinstance(cache, ArraysCache):
            cache = next(rest)
            if tokens.shape[1] > 1:
                cache = (LatentRowsView if isinstance(cache, LatentCache) else RowsView)(cache)
        elif states is not None:
            cache.cache = list(next(given))
        new.append(cache)
    output: mx.array = model(tokens, cache=with_leaves(caches, new))
    return output, [cache.cache for cache in new if isinstance(cache, ArraysCache)]


def _order(batch: StepBatch) -> Int32s:
    """Where each of `logit_tokens` is when those of a part lie together, part after part."""
    starts = [chunk.start for chunk in batch.chunks]
    lying = np.argsort(np.searchsorted(starts, batch.logit_tokens, side="right"), kind="stable")
    return np.argsort(lying).astype(np.int32)
