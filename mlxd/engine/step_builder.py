"""From a step's rows and chunks to the plan that the worker gets.

It does not know why they are in the step: the scheduler has decided that.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from mlxd.engine.kv_manager import KvManager
from mlxd.engine.request import Request
from mlxd.step import PromptRow, SlotInit, StepPlan


@dataclass(slots=True)
class ScheduledStep:
    """A plan that was made, and the requests behind it: `sampled` in the order of its sampled rows."""

    plan: StepPlan
    requests: list[Request]
    """in the order of the plan's slots"""
    sampled: list[Request]
    prompt_rows: list[tuple[Request, int]]
    """for each of the plan's prompt_rows, its request and the place in the prompt of its first token"""
    prefilled: list[Request]
    """requests whose tokens are all computed after this step, and that generate none"""
    num_decode_rows: int
    num_chunk_tokens: int
    num_background_tokens: int
    """of these, tokens that nobody waits for"""
    admitted: list[Request]
    """requests that got their slot in this step"""
    tells_cost: bool = True
    """whether its time says what tokens take: not if its chunks are what cuts for states have left"""

    @property
    def num_rows(self) -> int:
        """Requests in the step, those that sample nothing yet included."""
        return len(self.requests)


@dataclass(slots=True, frozen=True)
class Chunk:
    """Consecutive tokens of one request that a step computes."""

    request: Request
    start: int
    num_tokens: int
    targets: range
    """places of the prompt tokens whose log-probabilities it gives"""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        return self.end == self.request.num_tokens

    @property
    def samples(self) -> bool:
        return self.is_last and self.request.max_tokens > 0


class StepBuilder:
    """Numbers the plans, and tells the worker in each which slots have changed hands since the one before."""

    def __init__(self, kv: KvManager) -> None:
        self._kv = kv
        self._next_step_id = 0
        self._released: list[int] = []
        self._admitted: list[Request] = []
        self._publishing: list[Request] = []

    def admit(self, request: Request) -> None:
        """It has its slot from the next plan on."""
        self._admitted.append(request)

    def release(self, slot: int) -> None:
        """The slot is nobody's from the next plan on."""
        self._released.append(slot)

    def publish(self, request: Request) -> None:
        """Generated blocks of it are full once the next plan is computed: others may read them then."""
        self._publishing.append(request)

    def build(
        self, decode_rows: list[Request], chunks: list[Chunk], in_background: Request | None
    ) -> ScheduledStep:
        """The step that computes one more token of each of `decode_rows`, and `chunks`. It is planned then:
        requests count its tokens as computed. `in_background` is the one of them that nobody waits for."""
        requests = list(decode_rows)
        sampled = list(decode_rows)
        num_decode_rows = len(decode_rows)
        slots = array("i", [r.slot for r in decode_rows])
        context_lens = array("i", [r.num_computed_tokens for r in decode_rows])
        query_lens = array("i", [1]) * num_decode_rows
        sample = bytearray(b"\x01" * num_decode_rows)
        token_ids = array("i")
        prompt_rows: list[PromptRow] = []
        prompt_targets: list[tuple[Request, int]] = []
        prefilled: list[Request] = []
        num_background_tokens = 0
        for chunk in chunks:
            request, end = chunk.request, chunk.end
            requests.append(request)
            samples = chunk.samples
            targets = chunk.targets
            if targets:
                ids = array("i", request.params.prompt_token_ids[targets.start : targets.stop])
                start = targets.start - 1 - chunk.start
                num_top = request.params.prompt_logprobs
                prompt_rows.append(PromptRow(len(slots), start, ids.tobytes(), num_top))
                prompt_targets.append((request, targets.start))
            slots.append(request.slot)
            query_lens.append(chunk.num_tokens)
            context_lens.append(end)
            sample.append(samples)
            token_ids.extend(request.token_ids(chunk.start, end))
            if request is in_background:
                num_background_tokens = chunk.num_tokens
            request.num_computed_tokens = end
            if samples:
                sampled.append(request)
                request.decoding = True
                request.num_pending_tokens += 1
                request.num_samples_left -= 1
            elif chunk.is_last:
                request.decoding = True
                prefilled.append(request)
        slot_mapping, block_tables = self._kv.tables.fill(slots, query_lens, context_lens)
        load_states, save_states = self._kv.take_states(requests)
        states = self._kv.states
        tells_cost = (
            states is None
            or not chunks
            or not all(states.is_rest(chunk.request.slot, chunk.start, chunk.end) for chunk in chunks)
        )
        plan = StepPlan(
            step_id=self._next_step_id,
            num_decode_rows=num_decode_rows,
            slots=slots.tobytes(),
            query_lens=query_lens.tobytes(),
            context_lens=context_lens.tobytes(),
            sample=bytes(sample),
            token_ids=token_ids.tobytes(),
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            release=tuple(self._released),
            admit=tuple(_slot_init(r) for r in self._admitted),
            copy_blocks=self._kv.take_copies(),
            prompt_rows=tuple(prompt_rows),
            load_states=load_states,
            save_states=save_states,
        )
        # From the next plan on, others may read what this one writes. Not in this one: it copies blocks
        # before it writes any.
        for chunk in chunks:
            self._kv.publish(chunk.request)
        for request in self._publishing:
            self._kv.publish(request)
        admitted, self._admitted = self._admitted, []
        self._publishing.clear()
        self._released.clear()
        self._next_step_id += 1
        return ScheduledStep(
            plan,
            requests,
            sampled,
            prompt_targets,
            prefilled,
            num_decode_rows,
            len(token_ids),
            num_background_tokens,
            admitted,
            tells_cost,
        )


def _slot_init(request: Request) -> SlotInit:
    sampling = request.params.sampling
    history = b""
    if sampling.needs_token_history or sampling.grammar is not None:
        known = request.num_prompt_tokens + len(request.output_token_ids)
        history = array("i", request.token_ids(0, known)).tobytes()
    return SlotInit(request.slot, request.request_id, request.num_prompt_tokens, sampling, history)
