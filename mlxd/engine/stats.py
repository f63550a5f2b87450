"""Running totals and short memories of the engine, for /v1/status, /metrics and retry-after.

It does not know who reads them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from mlxd.engine.request import FinishReason, Request
from mlxd.metrics import BATCH_ROWS, REQUEST_SECONDS, TOKEN_SECONDS, TOKENS, WAIT_SECONDS, Histogram

SPEED_HALF_LIFE_SECONDS = 10.0
MEAN_WEIGHT = 0.1
"""of the newest value in a running average"""


@dataclass(slots=True)
class Speed:
    """Tokens computed a second of busy time; what is ten seconds old counts half."""

    tokens: float = 0.0
    seconds: float = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        kept = 0.5 ** (seconds / SPEED_HALF_LIFE_SECONDS)
        self.tokens = self.tokens * kept + num_tokens
        self.seconds = self.seconds * kept + seconds

    @property
    def tokens_per_second(self) -> float:
        """0 while nothing has been measured."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class DiskStats:
    """Totals of the disk tier."""

    num_stored_blocks: int = 0
    num_skipped_blocks: int = 0
    """that were evicted from memory, or too many, before they could be stored"""
    num_evicted_blocks: int = 0
    """given up on disk, for others"""
    num_restores: int = 0
    """times that a request waited for blocks to be read"""
    num_restored_tokens: int = 0
    """whose keys and values came back from disk"""
    errors: Counter[str] = field(default_factory=Counter)
    """by kind; mlxd/step.py names them"""


@dataclass(slots=True)
class EngineStats:
    """Totals since start; times in seconds, sizes in bytes. Histograms of requests count sequences: n
    choices are n of them."""

    num_steps: int = 0
    num_requests: int = 0
    """that ended, in whatever way"""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    """prompt tokens that the cache had"""
    num_evicted_blocks: int = 0
    """by KV managers that are gone; the present one counts its own"""
    prefix_hits: Counter[str] = field(default_factory=Counter)
    """requests by HitType"""
    num_preemptions: int = 0
    """of schedulers that are gone; the present one counts its own"""
    num_resumed: int = 0
    """requests that went on with another worker, each time"""
    num_background: int = 0
    """prompts computed that nobody waited for; no other total but those of steps has them"""
    num_background_dropped: int = 0
    """and given up, because others needed the worker for too long"""
    num_background_tokens: int = 0
    """computed for either"""
    finish_reasons: Counter[str] = field(default_factory=Counter)
    num_integrity_errors: int = 0
    disk: DiskStats = field(default_factory=DiskStats)
    active_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    cache_memory_bytes: int = 0
    speed: Speed = field(default_factory=Speed)
    mean_output_tokens: float = 0.0
    """running average of what a request generates"""

    queue_seconds: Histogram = field(default_factory=partial(Histogram, WAIT_SECONDS))
    """arrival to first step"""
    prefill_seconds: Histogram = field(default_factory=partial(Histogram, WAIT_SECONDS))
    """first step to first token"""
    ttft_seconds: Histogram = field(default_factory=partial(Histogram, WAIT_SECONDS))
    itl_seconds: Histogram = field(default_factory=partial(Histogram, TOKEN_SECONDS))
    """a token to the next, each gap by itself"""
    tpot_seconds: Histogram = field(default_factory=partial(Histogram, TOKEN_SECONDS))
    """the mean gap of each request"""
    e2e_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    prompt_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    output_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    step_seconds: Histogram = field(default_factory=partial(Histogram, TOKEN_SECONDS))
    step_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    step_rows: Histogram = field(default_factory=partial(Histogram, BATCH_ROWS))
    """requests in a step"""

    def count_step(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        self.num_steps += 1
        self.speed.observe(num_tokens, seconds)
        self.step_seconds.observe(seconds)
        self.step_tokens.observe(num_tokens)
        self.step_rows.observe(num_rows)

    def count_admitted(self, request: Request) -> None:
        """`request` has a slot for the first time."""
        assert request.prefix_hit is not None
        self.prefix_hits[request.prefix_hit.type.value] += 1
        self.num_cached_tokens += request.num_cached_tokens

    def count_first_token(self, request: Request, now: float) -> None:
        scheduled = request.first_scheduled_time
        assert scheduled is not None, "a token came from a request that never ran"
        self.ttft_seconds.observe(now - request.arrival_time)
        self.queue_seconds.observe(scheduled - request.arrival_time)
        self.prefill_seconds.observe(now - scheduled)

    def count_background(self, reason: FinishReason) -> None:
        """A prompt that nobody waited for is computed, or given up."""
        if reason is FinishReason.LENGTH:
            self.num_background += 1
        else:
            self.num_background_dropped += 1

    def count_finished(self, request: Request, reason: FinishReason, now: float) -> None:
        """`request` is over, however it ended."""
        num_output_tokens = len(request.output_token_ids)
        self.num_requests += 1
        self.finish_reasons[reason.value] += 1
        self.mean_output_tokens += MEAN_WEIGHT * (num_output_tokens - self.mean_output_tokens)
        self.e2e_seconds.observe(now - request.arrival_time)
        self.prompt_tokens.observe(request.num_prompt_tokens)
        self.output_tokens.observe(num_output_tokens)
        first, last = request.first_token_time, request.last_token_time
        if first is None or last is None:
            # Those that gave up in the queue waited too; without them a bad queue would look short.
            scheduled = request.first_scheduled_time
            self.queue_seconds.observe((now if scheduled is None else scheduled) - request.arrival_time)
        elif num_output_tokens > 1:
            self.tpot_seconds.observe((last - first) / (num_output_tokens - 1))
