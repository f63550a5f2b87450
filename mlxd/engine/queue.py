"""The waiting queue: who is admitted next.

It does not know blocks or steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from mlxd.engine.request import Request


class WaitingQueue:
    """Lower priority value first; within one priority, first come first served.

    A preempted request keeps its arrival time and so comes back ahead of everyone who came after it.
    Requests that ended while they waited are removed at once from the counts and lazily from the heap.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request]] = []
        self._entries = 0
        self._live: set[Request] = set()
        self.num_tokens = 0
        """prompt tokens of the waiting requests"""

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        """In the order of admission."""
        return (entry[3] for entry in sorted(self._heap, key=lambda e: e[:3]) if entry[3] in self._live)

    def push(self, request: Request) -> None:
        self._entries += 1
        heapq.heappush(self._heap, (request.params.priority, request.arrival_time, self._entries, request))
        self._live.add(request)
        self.num_tokens += request.num_prompt_tokens

    def peek(self) -> Request | None:
        """The request to admit next, or None."""
        while self._heap and self._heap[0][3] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def remove(self, request: Request) -> None:
        """Take out `request`, wherever it stands. It must be waiting here."""
        self._live.remove(request)
        self.num_tokens -= request.num_prompt_tokens
        if self._heap[0][3] is request:
            heapq.heappop(self._heap)
