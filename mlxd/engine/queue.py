"""The waiting queue: who is admitted next.

It does not know blocks or steps.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from math import floor

from mlxd.engine.request import Request, RequestStatus

QUANTUM_TOKENS = 64
"""A round's credit for a weight of 1. Rounds are skipped over by arithmetic, so a small one costs nothing,
and the smaller it is the less one client gets ahead of another."""


class Share:
    """One client's account among the requests of one priority.

    `deficit` is in tokens: what the client may still be given in this round, or, below 0, what it was given
    beyond it. A prompt is paid for at admission, save the tokens that the cache had; generated tokens are
    paid for as they come, since nobody knows before how many there will be.
    """

    __slots__ = ("deficit", "members", "waiting", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.deficit = 0.0
        self.waiting: OrderedDict[Request, None] = OrderedDict()
        """first come first, preempted ones not among them"""
        self.members: set[Request] = set()
        """the client's requests, those that run included"""

    def rounds_to_credit(self) -> int:
        """How many rounds it takes until the deficit is above 0."""
        return floor(-self.deficit / (QUANTUM_TOKENS * self.weight)) + 1

    def add_rounds(self, rounds: int) -> None:
        """A client that asks for nothing pays off its debt, but saves nothing up."""
        self.deficit += rounds * QUANTUM_TOKENS * self.weight
        if not self.waiting:
            self.deficit = min(self.deficit, 0.0)


class _Level:
    """The requests of one priority: deficit round robin (Shreedhar and Varghese, 1995) between clients.

    `ring` holds the shares with waiting requests; the first one with credit is served until it has none. When
    none has any, all get as many rounds' credit as it takes until one does. A client whose last request has
    ended is forgotten, debts and all, and starts level with the others when it comes back.
    """

    __slots__ = ("preempted", "ring", "shares")

    def __init__(self) -> None:
        self.shares: dict[str, Share] = {}
        self.ring: deque[Share] = deque()
        self.preempted: list[Request] = []
        """by arrival; ahead of the others, because their clients have paid for them"""

    def head(self) -> Request | None:
        if self.preempted:
            return self.preempted[0]
        ring = self.ring
        while ring:
            for _ in range(len(ring)):
                if ring[0].deficit > 0:
                    return next(iter(ring[0].waiting))
                ring.rotate(-1)
            rounds = min(share.rounds_to_credit() for share in ring)
            for share in self.shares.values():
                share.add_rounds(rounds)
        return None

    def push(self, request: Request, *, first: bool = False) -> None:
        if request.status is RequestStatus.PREEMPTED:
            insort(self.preempted, request, key=lambda r: r.arrival_time)
            return
        share = request.share
        if not share.waiting:
            self.ring.append(share)
        share.waiting[request] = None
        if first:
            share.waiting.move_to_end(request, last=False)

    def take(self, request: Request) -> None:
        if request.status is RequestStatus.PREEMPTED:
            self.preempted.remove(request)
            return
        share = request.share
        del share.waiting[request]
        if not share.waiting:
            self.ring.remove(share)


class WaitingQueue:
    """Lower priority value first; within one priority the preempted, then the clients by their fair shares.

    A client's own requests are served first come first. `GenerationRequest.client` says whose they are; two
    clients that always have something waiting are given tokens in the proportion of their weights.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []
        """the levels' keys, sorted"""
        self._live: dict[Request, None] = {}
        self._aside: set[Request] = set()
        self.num_tokens = 0
        """prompt tokens of the waiting requests"""

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        """By priority, the preempted first, then by arrival."""
        return iter(
            sorted(
                self._live,
                key=lambda r: (r.params.priority, r.status is not RequestStatus.PREEMPTED, r.arrival_time),
            )
        )

    def push(self, request: Request) -> None:
        """Queue a new request, or a preempted one again."""
        params = request.params
        level = self._levels.get(params.priority)
        if level is None:
            level = self._levels[params.priority] = _Level()
            insort(self._priorities, params.priority)
        share = level.shares.get(params.client)
        if share is None:
            share = level.shares[params.client] = Share(params.weight)
        share.members.add(request)
        request.share = share
        level.push(request)
        self._live[request] = None
        self.num_tokens += request.num_prompt_tokens

    def peek(self) -> Request | None:
        """The request to admit next, or None. The same one until something changes."""
        for priority in self._priorities:
            head = self._levels[priority].head()
            if head is not None:
                return head
        return None

    def admit(self, request: Request) -> None:
        """Take out `request`, which will run now, at its client's expense. It must be waiting here."""
        if request.status is not RequestStatus.PREEMPTED:
            request.share.deficit -= request.num_prompt_tokens - request.num_cached_tokens
        self.remove(request)

    def remove(self, request: Request) -> None:
        """Take out `request`, wherever it stands. It must be waiting here."""
        del self._live[request]
        self.num_tokens -= request.num_prompt_tokens
        if request in self._aside:
            self._aside.remove(request)
        else:
            self._levels[request.params.priority].take(request)

    def set_aside(self, request: Request) -> None:
        """`request` goes on waiting, but is passed over until `bring_back`: it is not ready for admission."""
        self._levels[request.params.priority].take(request)
        self._aside.add(request)

    def bring_back(self, request: Request) -> None:
        """`request`, which was set aside, is its client's next."""
        self._aside.remove(request)
        self._levels[request.params.priority].push(request, first=True)

    def forget(self, request: Request) -> None:
        """The request, which no longer waits, is over: a client without requests leaves nothing here."""
        params, share = request.params, request.share
        share.members.discard(request)
        if share.members:
            return
        level = self._levels[params.priority]
        del level.shares[params.client]
        if not level.shares:
            del self._levels[params.priority]
            self._priorities.remove(params.priority)
