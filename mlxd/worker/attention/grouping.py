"""Decode rows of like length, so that a short row does not pay for the longest.

It does not know blocks or queries: it sees one width a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GROUP_COST = 64
"""What one more group costs in a layer, in (row, block) pairs. On two CPU cores a group's dozen operations
take about as long as attending to 64 blocks of 16 tokens."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows (int, ascending width) that are padded to `width`."""

    rows: npt.NDArray[np.intp]
    width: int


def group_by_width(widths: npt.NDArray[np.int32]) -> list[RowGroup]:
    """Split rows into groups, each padded to its widest, with the least total cost.

    The cost is the sum over groups of rows * width + GROUP_COST. `widths` is int [D]; rows of one group keep
    their order when there is only one group, so that nothing has to be permuted.
    """
    if len(widths) == 0:
        return []
    order = np.argsort(widths, kind="stable")
    ends = [int(end) for end in np.flatnonzero(np.diff(widths[order], append=-1)) + 1]
    # best[i]: least cost of the rows before ends[i - 1], and where its last group begins.
    best = [0]
    begin = [0]
    starts = [0, *ends]
    for i, end in enumerate(ends, 1):
        width = int(widths[order[end - 1]])
        costs = [best[j] + (end - starts[j]) * width + GROUP_COST for j in range(i)]
        cheapest = min(range(i), key=costs.__getitem__)
        best.append(costs[cheapest])
        begin.append(cheapest)
    groups: list[RowGroup] = []
    i = len(ends)
    while i > 0:
        rows = order[starts[begin[i]] : starts[i]]
        groups.append(RowGroup(rows, int(widths[rows[-1]])))
        i = begin[i]
    groups.reverse()
    if len(groups) == 1:
        return [RowGroup(np.arange(len(widths)), groups[0].width)]
    return groups
