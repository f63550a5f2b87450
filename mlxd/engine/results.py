"""What a step's result does to its requests: their next tokens, their ends, and what is counted of them.

It does not know plans to come, the worker, or who waits for the tokens.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable
from typing import Protocol

from mlxd.engine.output_processor import append_token, end_prompt, force_tokens
from mlxd.engine.request import FinishReason, Request, RequestStatus
from mlxd.engine.scheduler import Scheduler
from mlxd.engine.stats import EngineStats
from mlxd.engine.step_builder import ScheduledStep
from mlxd.errors import HTTPStatusError, InternalError, InvalidRequestError
from mlxd.step import PromptLogprobs, StepResult

logger = logging.getLogger(__name__)

INT32_BYTES = 4


class EndEarly(Protocol):
    """Ends a request that is not through."""

    def __call__(self, request: Request, reason: FinishReason, error: Exception | None, /) -> None: ...


def is_answer(result: StepResult, step: ScheduledStep) -> bool:
    """Whether the result is that of this step, and has all that the plan asked for."""
    return (
        step.plan.step_id == result.step_id
        and len(result.token_ids) == INT32_BYTES * len(step.sampled)
        and (result.prompt_logprobs is None) == (not step.prompt_rows)
    )


class StepResults:
    """Applies one result after another, in the order of their steps.

    `finish` takes note that a request's last output is out; `end_early` makes that output too.
    """

    def __init__(
        self,
        stats: EngineStats,
        clock: Callable[[], float],
        *,
        finish: Callable[[Request, FinishReason, Scheduler], None],
        end_early: EndEarly,
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._finish = finish
        self._end_early = end_early
        self._last_time = math.nan
        """when the tokens of the step before came; equal to no time at first"""

    def apply(self, step: ScheduledStep, result: StepResult, scheduler: Scheduler) -> None:
        """Give the step's requests what `result`, its answer, has for them."""
        self._count_step(step, result)
        if result.prompt_logprobs is not None:
            self._take_prompt_logprobs(step, result.prompt_logprobs)
        for request in step.prefilled:
            if not request.status.is_finished:
                end_prompt(request)
                self._finish(request, FinishReason.LENGTH, scheduler)
        self._take_tokens(step, result, scheduler)

    def _take_tokens(self, step: ScheduledStep, result: StepResult, scheduler: Scheduler) -> None:
        sampled = array("i")
        sampled.frombytes(result.token_ids)
        errors = dict(result.row_errors) if result.row_errors else {}
        logprobs = result.logprobs or None
        stats = self._stats
        before, now = self._last_time, self._clock()
        self._last_time = now
        num_steady = 0  # rows that had a token in the step before too: one gap for them all
        over_above = RequestStatus.PREEMPTED  # before 3.12, a member of an enum takes 0.1 us to get at
        for row, request in enumerate(step.sampled):
            if request.status > over_above:
                continue  # it ended while this row was in flight
            if request.num_stale_samples:
                request.num_stale_samples -= 1
                continue
            token_id = sampled[row]
            if token_id < 0:
                self._end_early(request, FinishReason.ERROR, _row_error(errors.get(row)))
                continue
            last = request.last_token_time
            request.last_token_time = now
            if last == before:
                num_steady += 1
            elif last is None:
                request.first_token_time = now
                stats.count_first_token(request, now)
            else:
                stats.itl_seconds.observe(now - last)
            stats.num_output_tokens += 1 + len(request.unsaid_token_ids)
            try:
                reason = append_token(request, token_id, logprobs[row] if logprobs else None)
                if reason is None and request.thinking is not None and request.thinking.must_close:
                    reason = close_thinking(request, scheduler)
            except Exception:  # a bug in reading this answer: its text lacks a token's, the others go on
                logger.exception("an answer cannot be read", extra={"request_id": request.request_id})
                self._end_early(request, FinishReason.ERROR, InternalError("generation failed"))
                continue
            if reason is not None:
                self._finish(request, reason, scheduler)
            elif request.stream.is_backlogged:
                request.paused = True
        if num_steady:
            stats.itl_seconds.observe(now - before, num_steady)

    def _take_prompt_logprobs(self, step: ScheduledStep, part: PromptLogprobs) -> None:
        """Give each request its part of what the step found out about prompts."""
        start = 0
        for row, (request, first) in zip(step.plan.prompt_rows, step.prompt_rows, strict=True):
            stop = start + row.num_tokens
            known = request.prompt_logprobs
            if (
                known is not None
                and not request.status.is_finished
                and not known.extend(first, part, start, stop, row.num_top)
            ):
                error = InternalError("the model's output for this prompt is not a number")
                self._end_early(request, FinishReason.ERROR, error)
            start = stop

    def _count_step(self, step: ScheduledStep, result: StepResult) -> None:
        stats = self._stats
        num_rows, num_tokens = step.num_rows, step.num_decode_rows + step.num_chunk_tokens
        stats.count_step(num_rows, num_tokens, result.step_seconds)
        stats.num_background_tokens += step.num_background_tokens
        if result.active_memory_bytes:
            stats.active_memory_bytes = result.active_memory_bytes
            stats.peak_memory_bytes = result.peak_memory_bytes
            stats.cache_memory_bytes = result.cache_memory_bytes


def _row_error(problem: str | None) -> HTTPStatusError:
    """`problem` is what the worker has against the request; None where it is the model that failed."""
    if problem is None:
        return InternalError("the model's output for this request is not a number")
    return InvalidRequestError(problem)


def close_thinking(request: Request, scheduler: Scheduler) -> FinishReason | None:
    """The model has thought for as long as it may: it goes on as if it had closed the block itself."""
    assert request.params.thinking is not None
    reason = force_tokens(request, request.params.thinking.closing_token_ids)
    if reason is None:
        scheduler.restart(request)
    return reason
