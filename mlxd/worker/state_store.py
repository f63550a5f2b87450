"""The states of recurrent layers: of each slot, as the rows of whatever batch the slot ran in last.

It does not know what the arrays mean, or the model. They are never written to: a step's new states replace
those that it began with. So rows that run together again, which is what decode rows mostly do, cost no copy;
and nothing of a slot's state is left once the slot is released, but for what was saved of it: to save the
state of a row that ran alone, as chunks do, and to load one cost no copy either.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlxd.worker.support import StateShape

States = list[list[mx.array]]
"""of each recurrent layer, its arrays; a row of the batch on their first axis"""


@dataclass(eq=False, slots=True)
class _Batch:
    states: States
    num_rows: int
    rows: dict[int, int] = field(default_factory=dict)
    """slot -> row, of those whose state is here"""


class StateStore:
    """Slots that were not put, or released since, have zeros: only steps that warm up take such."""

    def __init__(self, shapes: Sequence[Sequence[StateShape]], num_snapshots: int = 0) -> None:
        """`shapes`: of each recurrent layer, its arrays. So many states can be saved."""
        self.num_snapshots = num_snapshots
        self._shapes = shapes
        self._snapshots: dict[int, States] = {}
        self._batches: dict[int, _Batch] = {}
        """of each slot"""

    def take(self, slots: Sequence[int], num_rows: int) -> States:
        """The states of `slots` as a batch of at least as many rows; what fills up is any slot's."""
        if missing := [slot for slot in slots if slot not in self._batches]:
            zeros = [[array.zeros(len(missing)) for array in layer] for layer in self._shapes]
            self._place(missing, zeros)
        batch = self._batches[slots[0]]
        rows = [batch.rows.get(slot) for slot in slots]
        if num_rows == batch.num_rows and rows == list(range(len(slots))):
            return batch.states
        runs = [
            (batch, [batch.rows[slot] for slot in run])
            for batch, run in itertools.groupby(slots, self._batches.__getitem__)
        ]
        runs[-1][1].extend([runs[-1][1][-1]] * (num_rows - len(slots)))
        taken = [(batch.states, mx.array(rows, dtype=mx.int32)) for batch, rows in runs]
        return [
            [
                _joined([states[layer][index][rows] for states, rows in taken])
                for index in range(len(batch.states[layer]))
            ]
            for layer in range(len(batch.states))
        ]

    def put(self, slots: Sequence[int], states: States) -> list[mx.array]:
        """Slot i's state is row i from now on. Returns what must be computed with this step.

        Slots that ran with these before and have not now take their rows elsewhere: a whole batch is not kept
        for some of its rows.
        """
        old = {id(batch): batch for batch in map(self._batches.get, slots) if batch is not None}
        self._place(slots, states)
        copies: list[mx.array] = []
        for batch in old.values():
            if left := list(batch.rows):
                moved = self.take(left, len(left))
                self._place(left, moved)
                copies += _flat(moved)
        return [*_flat(states), *copies]

    def release(self, slot: int) -> None:
        """Forget a slot's state, if it has one."""
        if (batch := self._batches.pop(slot, None)) is not None:
            del batch.rows[slot]

    def save(self, slot: int, snapshot: int) -> list[mx.array]:
        """Keep the slot's state under that number. Returns what must be computed with this step."""
        if not 0 <= snapshot < self.num_snapshots:
            raise ValueError(f"state {snapshot} of {self.num_snapshots}")
        # Some are parts of larger arrays, which would be kept with them.
        states = [[mx.contiguous(array) for array in layer] for layer in self.take([slot], 1)]
        self._snapshots[snapshot] = states
        return [*_flat(states)]

    def load(self, snapshot: int, slot: int) -> None:
        """The slot goes on from what was saved under that number."""
        self._place([slot], self._snapshots[snapshot])

    def _place(self, slots: Sequence[int], states: States) -> None:
        batch = _Batch(states, len(states[0][0]))
        for row, slot in enumerate(slots):
            self.release(slot)
            self._batches[slot] = batch
            batch.rows[slot] = row


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _flat(states: States) -> Iterable[mx.array]:
    return itertools.chain.from_iterable(states)
