"""A generation request, from submission to its one terminal output.

It does not know HTTP, dialects or blocks: prompts are token ids, answers are text and token deltas.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from mlxd.engine.prompt_logprobs import PromptLogprobs
from mlxd.engine.thinking import ThinkingParams, ThinkingWatch
from mlxd.step import SamplingParams, TokenLogprobs
from mlxd.text.stop import StopChecker

if TYPE_CHECKING:
    from mlxd._ext.hashed_tokens import HashedTokens
    from mlxd.engine.prefix_report import PrefixHit, PrefixReport
    from mlxd.engine.queue import Share
    from mlxd.engine.stream import OutputStream
    from mlxd.text.detokenizer import Detokenizer


EndCheck = Callable[[str], bool]
"""Is told of an answer's text as it comes; says whether it is whole, and so generation over."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks of the engine, validated and resolved against all defaults.

    One of these is one sequence: n choices or several prompts are several requests with their own `index`,
    submitted together. `max_tokens` counts generated tokens; the engine lowers it to what the context
    leaves. With 0 the prompt is computed, and nothing is generated.
    `stop` strings are cut from the text; `stop_token_ids` end generation and give no text.
    `sampling.seed` and `sampling.stop_token_ids` are the engine's to fill.
    `stream_interval`: tokens gathered before an output is handed over (the first and last go at once).
    """

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    index: int = 0
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    """end generation as the model's own end of turn does"""
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    thinking: ThinkingParams | None = None
    """how to count and limit the model's thinking; None where it does not think"""
    forced_token_ids: tuple[int, ...] = ()
    """tokens with which the answer begins because its grammar allows no others: computed with the prompt"""
    make_end_check: Callable[[], EndCheck] | None = None
    """makes what knows from the text alone that the answer is whole; it ends as if the model had ended it"""
    priority: int = 0
    """lower runs first"""
    client: str = ""
    """whose it is: requests of one priority share the worker fairly between clients"""
    weight: float = 1.0
    """the client's share, in proportion to those of the others"""
    prompt_logprobs: int = -1
    """-1 for none, else the alternatives beside each prompt token's log-probability (0: none beside it)"""
    stream_interval: int = 1
    seed: int | None = None
    """None: the engine draws one; it becomes sampling.seed"""
    timeout_seconds: float | None = None
    """None: the server's"""
    cache_salt: str = ""
    """requests share cached prefixes with those of the same salt only"""
    num_prompt_characters: int = 0
    """of the prompt's text; with `message_starts`"""
    message_starts: tuple[int, ...] = ()
    """where known, the character of the prompt's text where each message begins"""
    num_opening_tokens: int = 0
    """where known, those of the prompt before a user's first words: other conversations may begin so too"""
    also_known_as: str = ""
    """another id by which its client may ask for it; several requests can have the same"""
    background: bool = False
    """nobody waits for it: computed while nothing else waits, nobody's traffic. `max_tokens` is 0 then"""


class FinishReason(enum.StrEnum):
    """Why a request ended, from good to bad; each dialect has its own words for these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.IntEnum):
    """Ordered: everything above PREEMPTED is over."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORTED = 5
    FINISHED_ERROR = 6

    @property
    def is_finished(self) -> bool:
        return self > RequestStatus.PREEMPTED


class RequestOutput(msgspec.Struct):
    """What a request gained since its last output. The one with a `finish_reason` is the last.

    `text` is the new text, safe to show (UTF-8 complete, no part of a stop string). `token_ids` and
    `logprobs` are of the new tokens; their text may come with a later output. `stop_reason` is the stop
    string or token id that ended the request; None for the model's own end of turn. `error` is set where
    `finish_reason` is error or abort. The counts are totals so far.

    Not with `gc=False`: an `error` that was raised refers to frames that hold this, and not everybody who
    catches it lets go of these.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    """all of them, with the first output of a request that asked"""

    def absorb(self, later: RequestOutput) -> None:
        """Append the next output of the same request to this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.error = later.error
        self.num_output_tokens = later.num_output_tokens
        self.num_cached_tokens = later.num_cached_tokens
        self.num_reasoning_tokens = later.num_reasoning_tokens


class Request:
    """The engine's own record of a sequence.

    Append-only: `output_token_ids` grows, never shrinks, also across preemption, because a client may have
    seen every token in it. `num_computed_tokens` is what the KV cache holds once all sent plans have run;
    `num_pending_tokens` is how many samples are in flight. Their targets follow from the tokens, so there
    is no prefill phase and no decode phase: a row is a decode row where only the token sampled last in this
    slot (`decoding`) is left to compute.
    """

    __slots__ = (
        "arrival_time",
        "decoding",
        "detokenizer",
        "end_check",
        "first_scheduled_time",
        "first_token_time",
        "hashed_tokens",
        "held_output",
        "last_token_time",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_lost_workers",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_resumed_tokens",
        "num_samples_left",
        "num_stale_samples",
        "num_worker_deaths",
        "output_token_ids",
        "params",
        "paused",
        "prefix_hit",
        "prefix_report",
        "prompt_logprobs",
        "share",
        "slot",
        "status",
        "stop_checker",
        "stop_token_ids",
        "stream",
        "thinking",
        "unsaid_token_ids",
    )

    def __init__(
        self,
        params: GenerationRequest,
        *,
        stream: OutputStream,
        detokenizer: Detokenizer,
        stop_token_ids: frozenset[int],
        max_tokens: int,
        arrival_time: float,
    ) -> None:
        self.params = params
        self.stream = stream
        self.detokenizer = detokenizer
        self.stop_checker = StopChecker(params.stop) if params.stop else None
        self.thinking = ThinkingWatch(params.thinking) if params.thinking else None
        self.end_check = params.make_end_check() if params.make_end_check else None
        self.stop_token_ids = stop_token_ids
        """token ids that end this request, the model's own among them unless ignore_eos"""
        self.max_tokens = max_tokens
        self.num_prompt_tokens = len(params.prompt_token_ids)
        # At least one token is sampled, where any is wanted.
        self.unsaid_token_ids = params.forced_token_ids[: max(0, max_tokens - 1)]
        """of the tokens that are out, those that go into the first output"""
        self.output_token_ids: list[int] = [*self.unsaid_token_ids]
        self.prompt_logprobs = PromptLogprobs() if params.prompt_logprobs >= 0 else None
        self.held_output: RequestOutput | None = None
        """gathered for stream_interval, not yet handed over"""

        # Scheduling state, the scheduler's to change.
        self.status = RequestStatus.WAITING
        self.share: Share
        """the client's account, the waiting queue's to set"""
        self.slot = -1
        self.decoding = False
        """the last token was sampled in this slot, so the next row is a decode row"""
        self.paused = False
        """the client reads too slowly; no rows until it has caught up"""
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_samples_left = max_tokens - len(self.output_token_ids)
        """samples that may still be scheduled"""
        self.num_stale_samples = 0
        """samples in flight that were overtaken: tokens were put in their place"""
        self.num_cached_tokens = 0
        """prompt tokens that the cache had at the first admission"""
        self.num_preemptions = 0
        self.num_resumed_tokens = 0
        """output tokens that were known at the last admission"""
        self.num_worker_deaths = 0
        """that it may have caused"""
        self.num_lost_workers = 0
        """workers that died while it ran"""
        self.hashed_tokens: HashedTokens | None = None
        """the KV manager's view of the known tokens"""
        self.prefix_hit: PrefixHit | None = None
        """how the first admission met the cache; None before"""
        self.prefix_report: PrefixReport | None = None
        """and what it takes to explain it"""

        self.arrival_time = arrival_time
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None

    @property
    def request_id(self) -> str:
        return self.params.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those still in flight included."""
        return self.num_prompt_tokens + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether log-probabilities of its prompt are still to come, so that all of it is computed."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def is_proven(self) -> bool:
        """Whether the worker has given it a token since it was admitted last."""
        return len(self.output_token_ids) > self.num_resumed_tokens

    def lose_worker(self) -> None:
        """Nothing is computed or in flight any more; the known tokens stay, and a seed's numbers follow from
        the position alone, so that another worker goes on as this one would have."""
        if self.status is RequestStatus.RUNNING:
            self.status = RequestStatus.PREEMPTED
        self.slot = -1
        self.decoding = False
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_stale_samples = 0
        self.num_samples_left = self.max_tokens - len(self.output_token_ids)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known tokens `start` … `stop` - 1 of prompt and output together."""
        prompt = self.params.prompt_token_ids
        if stop <= self.num_prompt_tokens:
            return prompt[start:stop]
        output_start = max(0, start - self.num_prompt_tokens)
        return prompt[start:] + self.output_token_ids[output_start : stop - self.num_prompt_tokens]
