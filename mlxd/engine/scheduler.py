"""The scheduler: turns requests into step plans, and results into tokens of requests.

It does not know asyncio, text, clients or the worker; time is an argument. One rule drives it: a request
has `num_tokens` tokens and `num_computed_tokens` of them in the KV cache; every step hands out tokens until
the first meets the second. Prefill chunks, resumption after preemption and decoding are all that rule.
"""

from __future__ import annotations

from array import array
from collections import defaultdict, deque

from mlxd.config import SchedulerConfig
from mlxd.engine.cost import StepCostModel
from mlxd.engine.disk_restore import MAX_FETCHES
from mlxd.engine.disk_tier import DiskTier
from mlxd.engine.kv_manager import KvManager
from mlxd.engine.prefix_match import Match
from mlxd.engine.queue import WaitingQueue
from mlxd.engine.request import Request, RequestStatus
from mlxd.engine.step_builder import Chunk, ScheduledStep, StepBuilder
from mlxd.step import MIN_PROMPT_ROWS

MAX_ADMITTED_TOKENS = 1 << 17
"""of newcomers in one step, unless one has more. To hash them, look them up and give them their blocks takes
about a millisecond for 100,000, also where all are cached, and meanwhile nobody gets a token. To set those
aside that wait for the disk takes 2.5."""


class Scheduler:
    """Decides what the next step computes.

    `waiting` holds requests without slot or blocks (new and preempted ones), `running` those with both, in
    order of admission. Decode rows come first in every step, then prefill chunks in order of admission, then
    newcomers, while the step's token budget lasts. When blocks run out, the running request that came last
    is preempted: its blocks go, its tokens stay.

    `background` holds prompts that nobody waits for. One of them at a time runs, in steps that compute no
    other prompt, and gives its slot and blocks back as soon as anybody waits.
    """

    def __init__(self, config: SchedulerConfig, kv: KvManager, disk: DiskTier | None = None) -> None:
        self.kv = kv
        self.disk = disk
        self.cost = StepCostModel(config.max_step_ms / 1e3, config.max_num_batched_tokens)
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self.background: deque[Request] = deque()
        self.num_preemptions = 0
        self._max_num_seqs = config.max_num_seqs if config.continuous_batching else 1
        self._max_logit_rows = config.max_num_seqs
        self._num_prompt_rows_left = 0
        """positions of prompts whose logits this step can still compute: the memory for logits is planned"""
        self._builder = StepBuilder(kv)
        self._in_background: Request | None = None
        """the one of `running` that nobody waits for"""

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.background)

    @property
    def num_running(self) -> int:
        """Running requests that somebody waits for."""
        return len(self.running) - (self._in_background is not None)

    @property
    def starves(self) -> bool:
        """Whether requests wait for blocks that no other request will give back: none runs, or waits for the
        disk."""
        is_reading = self.disk is not None and self.disk.num_restoring
        return len(self.waiting) > 0 and not self.running and not is_reading

    def add(self, request: Request) -> None:
        """Queue a new request. Whether it can ever fit was checked at submission."""
        if request.params.background:
            self.background.append(request)
        else:
            self.waiting.push(request)

    def schedule(self, now: float) -> ScheduledStep | None:
        """Plan one step, or None when nothing can run before a result comes back."""
        decode_rows = self._schedule_decodes()
        if self.disk is not None and self.disk.num_restoring:
            # Running streams wait for one piece at most; where none waits, all that has come is taken.
            most = 1 if decode_rows else MAX_FETCHES
            self._bring_back(self.disk.restored(self.kv, len(self.running), most, now))
        chunks = self._schedule_chunks(len(decode_rows), now)
        if not decode_rows and not chunks:
            return None
        return self._builder.build(decode_rows, chunks, self._in_background)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End `request`, wherever it is; its blocks are free before the next plan."""
        if request.slot >= 0:
            self.running.remove(request)
            # What a failed request left may be what made it fail (NaN), so nobody else shall have it.
            self._release(request, keep=status is not RequestStatus.FINISHED_ERROR)
        elif request.params.background:
            self.background.remove(request)
        elif not request.status.is_finished:
            self.waiting.remove(request)
            if self.disk is not None:
                self._bring_back(self.disk.cancel(request))
        if not request.params.background:
            self.waiting.forget(request)
        request.status = status

    def restart(self, request: Request) -> None:
        """Go on behind tokens that nobody sampled: they have been appended to `request`'s output.

        As after a preemption, slot and blocks go and all tokens are computed anew. Samples in flight follow
        a token that is no longer the last: they are stale.
        """
        request.num_stale_samples = request.num_pending_tokens
        request.num_samples_left = request.max_tokens - len(request.output_token_ids)
        if request.slot >= 0:
            self.running.remove(request)
            self._requeue(request)

    def expire_restores(self, now: float) -> None:
        """Let those go on without the disk who have waited for it too long."""
        if self.disk is not None:
            self._bring_back(self.disk.expire(now))

    def clear_disk(self) -> None:
        """Forget what is on disk; nobody waits for it any more."""
        if self.disk is not None:
            self._bring_back(self.disk.clear())

    def update(self, step: ScheduledStep, seconds: float) -> None:
        """Account for a step that ran; the caller appends its tokens."""
        for request in step.sampled:
            request.num_pending_tokens -= 1
            request.share.deficit -= 1.0
        if step.tells_cost:
            self.cost.observe(step.num_decode_rows, step.num_chunk_tokens, seconds)

    def check_integrity(self) -> None:
        """Every slot has its request; where nothing runs, free + cached + pinned blocks are all there are.

        And what KvManager looks at. Raises AssertionError with the numbers.
        """
        self.kv.check_integrity()
        if self.kv.num_used_slots != len(self.running):
            raise AssertionError(f"{self.kv.num_used_slots} slots for {len(self.running)} running requests")
        if not self.running and self.kv.num_used_blocks != self.kv.num_held_blocks:
            raise AssertionError(
                f"{self.kv.num_used_blocks} blocks are owned and {self.kv.num_held_blocks} pinned, but "
                "nothing runs"
            )

    def _schedule_decodes(self) -> list[Request]:
        rows = [r for r in self.running if r.decoding and r.num_samples_left > 0 and not r.paused]
        while rows:
            slots = array("i", [r.slot for r in rows])
            context_lens = array("i", [r.num_computed_tokens + 1 for r in rows])
            num_reserved = self.kv.reserve_rows(slots, context_lens)
            if num_reserved == len(rows):
                break
            self._preempt(self._last_running())
            rows = [r for r in rows if r.slot >= 0]
        block_size = self.kv.block_size
        for request in rows:
            request.num_computed_tokens += 1
            request.num_pending_tokens += 1
            request.num_samples_left -= 1
            # Once a block, and for the sake of the longest step not all in the same one, though many
            # requests may have begun together.
            if (request.num_computed_tokens + request.slot) % block_size == 0:
                self._builder.publish(request)
        return rows

    def _schedule_chunks(self, num_decode_rows: int, now: float) -> list[Chunk]:
        chunks: list[Chunk] = []
        if self._in_background is not None and len(self.waiting):
            # What it has computed is cached: if it was for the newcomer, that goes on from there.
            self.running.remove(self._in_background)
            self._requeue(self._in_background)
        budget = self.cost.chunk_tokens(num_decode_rows)
        self._num_prompt_rows_left = max(MIN_PROMPT_ROWS, self._max_logit_rows - num_decode_rows)
        for request in self.running:
            if budget <= 0:
                return chunks
            if not request.decoding and request is not self._in_background:
                budget -= self._add_chunk(request, budget, chunks)
        num_admitted_tokens = 0
        beginnings: defaultdict[bytes, list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            beginnings[self.kv.beginning(chunk.request)].append(chunk)
        while budget > 0 and len(self.running) < self._max_num_seqs:
            newcomer = self.waiting.peek()
            # A preempted request waits for its samples in flight: they are part of what it computes again.
            if newcomer is None or newcomer.num_pending_tokens:
                break
            if newcomer.needs_prompt_logits and not self._num_prompt_rows_left:
                break
            if num_admitted_tokens and num_admitted_tokens + newcomer.num_tokens > MAX_ADMITTED_TOKENS:
                break
            match = self.kv.match(newcomer)
            alike = beginnings[self.kv.beginning(newcomer)]
            if alike and self._had_better_wait(newcomer, match, alike, num_decode_rows):
                break
            if self._restore_first(newcomer, match, now):
                if chunks or num_decode_rows:  # else no result would have the others looked at
                    num_admitted_tokens += newcomer.num_tokens
                continue
            # Room for one more block for each running request, or the newcomer would soon be preempted.
            if not self.kv.admit(newcomer, match, headroom=len(self.running)):
                break
            num_admitted_tokens += newcomer.num_tokens
            self.waiting.admit(newcomer)
            self._begin(newcomer, now)
            budget -= self._add_chunk(newcomer, budget, chunks)
            alike += [chunk for chunk in chunks[-1:] if chunk.request is newcomer]
        if not chunks and not len(self.waiting):
            self._schedule_background(num_decode_rows, now, chunks)
        return chunks

    def _schedule_background(self, num_decode_rows: int, now: float, chunks: list[Chunk]) -> None:
        request = self._in_background
        if request is None:
            if not self.background or len(self.running) >= self._max_num_seqs:
                return
        elif request.decoding:
            return
        num_tokens = self.cost.background_tokens(num_decode_rows)
        if not num_tokens:
            return
        if request is None:
            request = self.background[0]
            if not self.kv.admit(request, self.kv.match(request), headroom=len(self.running)):
                return
            self._in_background = self.background.popleft()
            self._begin(request, now)
        self._add_chunk(request, num_tokens, chunks)

    def _begin(self, newcomer: Request, now: float) -> None:
        newcomer.status = RequestStatus.RUNNING
        newcomer.num_resumed_tokens = len(newcomer.output_token_ids)
        newcomer.first_scheduled_time = newcomer.first_scheduled_time or now
        self.running.append(newcomer)
        self._builder.admit(newcomer)

    def _had_better_wait(
        self, newcomer: Request, match: Match, alike: list[Chunk], num_decode_rows: int
    ) -> bool:
        """Whether this step computes so much of what `newcomer` needs that it starts sooner after it: in the
        chunks of prompts that begin alike.

        One step is all it waits: every chunk has its share of the budget, so what is left of the budget now
        is left because those prompts end in this step, or because they are cut where a state is kept.
        """
        # Asked of itself first: to compare many prompts with one another would take long.
        if not self.cost.exceeds_a_step(newcomer.num_tokens, num_decode_rows):
            return False
        num_tokens = self.kv.tokens_soon_cached(newcomer, match, ((c.request, c.end) for c in alike))
        return num_tokens > 0 and self.cost.exceeds_a_step(num_tokens, num_decode_rows)

    def _restore_first(self, newcomer: Request, match: Match, now: float) -> bool:
        """Whether more of `newcomer`'s blocks are on disk: then it waits for them, while others go on."""
        disk = self.disk
        if disk is None or newcomer.needs_prompt_logits:
            return False
        if not self.kv.could_admit(newcomer, match, headroom=len(self.running)):
            return False
        if not disk.begin_restore(newcomer, self.kv.tokens_of(newcomer), len(match.block_ids), now):
            return False
        self.waiting.set_aside(newcomer)
        return True

    def _bring_back(self, requests: list[Request]) -> None:
        for request in reversed(requests):
            self.waiting.bring_back(request)

    def _add_chunk(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        start = request.num_computed_tokens
        end = start + min(budget, request.num_tokens - start)
        if self.kv.states is not None:
            end = self.kv.states.chunk_end(
                request.slot, start, end, request.num_tokens, lambda n: self.cost.exceeds_a_step(n, 1)
            )
        targets = range(0)
        if request.prompt_logprobs is not None:
            # Position p predicts token p + 1, also if that one is in the next chunk.
            first = max(start, len(request.prompt_logprobs)) + 1
            targets = range(first, min(end + 1, request.num_prompt_tokens))
            if len(targets) > self._num_prompt_rows_left:
                targets = targets[: self._num_prompt_rows_left]
                end = targets.stop - 1
                if end == start:
                    return 0
            self._num_prompt_rows_left -= len(targets)
        chunks.append(Chunk(request, start, end - start, targets))
        return end - start

    def _last_running(self) -> Request:
        """Whom to preempt: of the least urgent priority, the one that arrived last."""
        return self._in_background or max(self.running, key=lambda r: (r.params.priority, r.arrival_time))

    def _preempt(self, request: Request) -> None:
        """Take slot and blocks from `request` and queue it again; its tokens are computed anew later."""
        self.running.remove(request)
        if not request.params.background:
            request.num_preemptions += 1
            self.num_preemptions += 1
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        if request.params.background:
            self.background.appendleft(request)
        else:
            self.waiting.push(request)

    def _release(self, request: Request, *, keep: bool = True) -> None:
        if request is self._in_background:
            self._in_background = None
        self._builder.release(self.kv.release(request, keep=keep))
        request.decoding = False
        request.num_computed_tokens = 0
