"""A front in miniature: hands out blocks, makes step plans, appends what comes back.

It does what a scheduler does with nothing left out that a runner could notice: chunks, preemption, slots
that are used again, blocks in random order, one step in flight.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from mlxd.step import (
    PromptLogprobs,
    PromptRow,
    SamplingParams,
    SlotInit,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from mlxd.worker.runner import PendingStep, Runner

GREEDY = SamplingParams(temperature=0.0)


def int32(values: object) -> bytes:
    return np.asarray(values, dtype=np.int32).tobytes()


@dataclass(eq=False)
class Sequence:
    """One request. `chunk_size` 0: the whole prompt at once."""

    slot: int
    prompt: list[int]
    sampling: SamplingParams
    chunk_size: int = 0
    prompt_logprobs: int = -1
    prompt_results: list[tuple[range, PromptLogprobs]] = field(default_factory=list)
    """of each chunk, the rows of the step's result that are its own, and that result"""
    outputs: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    admitted: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.outputs) + self.num_pending

    @property
    def decodes(self) -> bool:
        """Whether its next input is the token sampled last in its slot."""
        return (
            self.admitted and self.num_computed == self.num_tokens - 1 and self.num_tokens > len(self.prompt)
        )


class Driver:
    """Drives a runner. `block_size` and `num_blocks` are the runner's."""

    def __init__(self, runner: Runner, *, num_blocks: int, block_size: int, num_slots: int = 40) -> None:
        self.runner = runner
        self.block_size = block_size
        self.sequences: list[Sequence] = []
        self.last_plan: StepPlan | None = None
        self._blocks = list(range(1, num_blocks))
        random.Random(0).shuffle(self._blocks)
        self._slots = list(range(num_slots))
        self._released: list[int] = []
        self._copies: list[tuple[int, int]] = []
        self._loads: list[tuple[int, int]] = []
        self._saves: list[tuple[int, int]] = []
        self._step_id = 0
        self._in_flight: list[tuple[PendingStep, list[Sequence], list[tuple[Sequence, int]]]] = []
        """the step, who samples, and whose prompts' log-probabilities it gives, how many each"""

    def add(
        self,
        prompt: list[int],
        sampling: SamplingParams = GREEDY,
        *,
        chunk_size: int = 0,
        prompt_logprobs: int = -1,
    ) -> Sequence:
        sequence = Sequence(self._slots.pop(0), prompt, sampling, chunk_size, prompt_logprobs)
        self.sequences.append(sequence)
        return sequence

    def fork(self, source: Sequence, sampling: SamplingParams = GREEDY) -> Sequence:
        """A sequence with source's prompt: full blocks shared, the last one copied, one token computed."""
        sequence = self.add(list(source.prompt), sampling)
        sequence.num_computed = len(source.prompt) - 1
        num_full = sequence.num_computed // self.block_size
        sequence.blocks = source.blocks[:num_full]
        if sequence.num_computed % self.block_size:
            sequence.blocks.append(self._blocks.pop(0))
            self._copies.append((source.blocks[num_full], sequence.blocks[num_full]))
        return sequence

    def save(self, sequence: Sequence, snapshot: int) -> None:
        """The next step saves the sequence's state."""
        self._saves.append((sequence.slot, snapshot))

    def resume(self, snapshot: int, blocks: list[int], prompt: list[int], *, chunk_size: int = 0) -> Sequence:
        """A sequence that begins with these full blocks, and the state that was saved where they end."""
        sequence = self.add(prompt, chunk_size=chunk_size)
        sequence.blocks = list(blocks)
        sequence.num_computed = len(blocks) * self.block_size
        self._loads.append((snapshot, sequence.slot))
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        self._release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take slot and blocks; the sequence starts over, prompt and outputs, elsewhere."""
        self.drain()
        self._release(sequence)
        sequence.slot = self._slots.pop(0)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.admitted = False

    def step(self, *, wait: bool = True) -> None:
        """Plan and launch one step for all sequences; without `wait`, one step stays in flight."""
        decoding = [sequence for sequence in self.sequences if sequence.decodes]
        others = [sequence for sequence in self.sequences if not sequence.decodes]
        rows = decoding + others
        query_lens, sample, tokens, mapping, admit, sampled = [], [], [], [], [], []
        prompt_rows: list[PromptRow] = []
        asking: list[tuple[Sequence, int]] = []
        for sequence in rows:
            if not sequence.admitted:
                admit.append(self._slot_init(sequence))
                sequence.admitted = True
            left = sequence.num_tokens - sequence.num_computed
            length = min(left, sequence.chunk_size or left)
            first, last = sequence.num_computed, sequence.num_computed + length
            while len(sequence.blocks) * self.block_size < last:
                sequence.blocks.append(self._blocks.pop(0))
            targets = sequence.prompt[first + 1 : last + 1]
            if sequence.prompt_logprobs >= 0 and targets:
                asking.append((sequence, len(targets)))
                prompt_rows.append(PromptRow(len(query_lens), 0, int32(targets), sequence.prompt_logprobs))
            query_lens.append(length)
            sample.append(int(length == left))
            if sequence not in decoding:
                tokens += (sequence.prompt + sequence.outputs)[first:last]
            mapping += [
                sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size
                for position in range(first, last)
            ]
            sequence.num_computed = last
            if length == left:
                sequence.num_pending += 1
                sampled.append(sequence)
        self.last_plan = StepPlan(
            step_id=self._step_id,
            num_decode_rows=len(decoding),
            slots=int32([sequence.slot for sequence in rows]),
            query_lens=int32(query_lens),
            context_lens=int32([sequence.num_computed for sequence in rows]),
            sample=bytes(sample),
            token_ids=int32(tokens),
            slot_mapping=int32(mapping),
            block_tables=int32([block for sequence in rows for block in sequence.blocks]),
            release=tuple(self._released),
            admit=tuple(admit),
            copy_blocks=tuple(self._copies),
            prompt_rows=tuple(prompt_rows),
            load_states=tuple(self._loads),
            save_states=tuple(self._saves),
        )
        self._step_id += 1
        self._released, self._copies, self._loads, self._saves = [], [], [], []
        self._in_flight.append((self.runner.launch(self.last_plan), sampled, asking))
        while len(self._in_flight) > (0 if wait else 1):
            self._finish()

    def drain(self) -> None:
        while self._in_flight:
            self._finish()

    def run(self, num_outputs: int, *, wait: bool = True) -> None:
        """Step until every sequence has at least this many outputs."""
        while any(len(s.outputs) + s.num_pending < num_outputs for s in self.sequences):
            self.step(wait=wait)
        self.drain()

    def _finish(self) -> None:
        pending, sampled, asking = self._in_flight.pop(0)
        result: StepResult = pending.result()
        tokens = np.frombuffer(result.token_ids, dtype=np.int32).tolist()
        assert len(tokens) == len(sampled)
        errors = dict(result.row_errors)
        first = 0
        assert (result.prompt_logprobs is None) == (not asking)
        for sequence, count in asking:
            assert result.prompt_logprobs is not None
            sequence.prompt_results.append((range(first, first + count), result.prompt_logprobs))
            first += count
        for index, (sequence, token) in enumerate(zip(sampled, tokens, strict=True)):
            sequence.num_pending -= 1
            sequence.outputs.append(token)
            sequence.logprobs.append(result.logprobs[index] if result.logprobs else None)
            if index in errors:
                sequence.errors.append(errors[index])

    def _slot_init(self, sequence: Sequence) -> SlotInit:
        needs = sequence.sampling.needs_token_history or sequence.sampling.grammar is not None
        history = sequence.prompt + sequence.outputs if needs else []
        return SlotInit(sequence.slot, "request", len(sequence.prompt), sequence.sampling, int32(history))

    def _release(self, sequence: Sequence) -> None:
        self._released.append(sequence.slot)
        self._slots.append(sequence.slot)
        self._blocks.extend(sequence.blocks)
