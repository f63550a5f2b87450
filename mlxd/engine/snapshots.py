"""Which states of recurrent layers the worker keeps for later requests, and of which tokens each is.

It does not know tensors, blocks or plans. A state cannot be cut back as blocks can: to go on from a prefix
takes the very state at its end. So prompts are cut where one is likely to be asked for, and it is kept there,
if to compute the tokens again would take longer than a chunk more does:

- near a prompt's end, for the next turn and for other answers to it;
- before a user's first words, for other conversations under the same system prompt, with the same tools;
- where a prompt parts from what is cached, because what two have had in common a third may have too;
- as far as a running request has come, now and then, so that little is lost of one that is preempted or
  cancelled, or whose answer is shown again as it was. Each has one of these: a later one takes its place.

When all are taken the state used longest ago is given up. Its number can go to another at once, whatever is
in flight: the worker runs plans in the order in which they were sent, in each it loads before it saves, and a
state that was loaded is its sequence's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mlxd._ext.hashed_tokens import HashedTokens

TAIL_TOKENS = 8
"""What a prompt ends with to ask for the answer (`<|im_start|>assistant`, an empty block of thinking) is not
in the next turn's, or not so: the state is kept before it."""
MIN_BLOCKS = 4
"""from the last state to another, at least: it takes the memory of many blocks"""
PROGRESS_BLOCKS = 8
"""computed since the last state when another is worth the copy that it takes of a decode row. In some slots
it is up to twice as many: of requests that began together not all shall be copied in one step."""


@dataclass(slots=True, eq=False)
class Snapshot:
    """State `number` of the worker: behind `num_blocks` full blocks, of which the last has the hash `key`."""

    number: int
    key: bytes
    num_blocks: int
    is_progress: bool
    """its request goes on, and takes it back once it has come further"""
    num_holds: int = 0


@dataclass(slots=True)
class _Sequence:
    """A running request. Positions count tokens."""

    points: tuple[int, ...]
    """where its prompt is cut, in order"""
    saved: int
    """the newest position with a state, or where it began"""
    loaded: Snapshot | None
    answers: bool
    """whether anything is generated; if not, the prompt is computed for the sake of its state alone"""
    made: list[Snapshot] = field(default_factory=list)
    progress: Snapshot | None = None
    pending: tuple[int, int] | None = None
    """(position, number): a plan saves it, but the tokens up to there are not all known yet"""


class Snapshots:
    """States 0 … num_snapshots - 1, for prefixes of whole blocks of `block_size` tokens."""

    def __init__(self, num_snapshots: int, block_size: int) -> None:
        self.num_snapshots = num_snapshots
        self._block_size = block_size
        self._free = list(range(num_snapshots - 1, -1, -1))
        self._kept: OrderedDict[bytes, Snapshot] = OrderedDict()
        """by key, used longest ago first"""
        self._sequences: dict[int, _Sequence] = {}
        """by slot"""
        self._keeping: set[int] = set()
        """slots whose sequences have a `progress`, or a state pending"""
        self._loads: list[tuple[int, int]] = []

    @property
    def num_kept(self) -> int:
        """Those that a newcomer could begin with."""
        return len(self._kept)

    @property
    def max_held(self) -> int:
        """How many `hold` keeps: half of all."""
        return self.num_snapshots // 2

    # Finding

    def longest(self, tokens: HashedTokens, num_blocks: int) -> Snapshot | None:
        """Of those within the first `num_blocks` blocks of `tokens`, which are cached, the farthest."""
        if len(self._kept) < num_blocks:  # of a long prompt's blocks there are several thousand
            own = [
                snapshot
                for snapshot in self._kept.values()
                if snapshot.num_blocks <= num_blocks
                and snapshot.key == tokens.block_hash(snapshot.num_blocks - 1)
            ]
            return max(own, key=lambda snapshot: snapshot.num_blocks, default=None)
        for index in range(num_blocks - 1, -1, -1):
            if (found := self._kept.get(tokens.block_hash(index))) is not None:
                return found
        return None

    def last_point(self, num_prompt_tokens: int, *, answers: bool = True) -> int:
        """Where the last state of a prompt is kept, 0 if it is too short; `answers`: one is generated."""
        num_tokens = num_prompt_tokens - 1 - TAIL_TOKENS if answers else num_prompt_tokens
        return max(0, num_tokens // self._block_size * self._block_size)

    # A request's life: slots are those of the block tables

    def begin(
        self,
        slot: int,
        snapshot: Snapshot | None,
        wanted: Iterable[int],
        num_prompt_tokens: int,
        *,
        answers: bool,
    ) -> None:
        """The slot's request goes on from `snapshot`. Others might from the positions `wanted`."""
        start = 0
        if snapshot is not None:
            start = snapshot.num_blocks * self._block_size
            self._kept.move_to_end(snapshot.key)
            self._loads.append((snapshot.number, slot))
        points: list[int] = []
        least = (MIN_BLOCKS if answers else 1) * self._block_size
        last = self.last_point(num_prompt_tokens, answers=answers)
        whole = {position - position % self._block_size for position in wanted if position < last}
        for point in sorted({*whole, last}):
            if point - (points[-1] if points else start) >= least:
                points.append(point)
        self._sequences[slot] = _Sequence(tuple(points), start, snapshot, answers)

    def chunk_end(
        self, slot: int, start: int, end: int, num_tokens: int, is_worth_a_step: Callable[[int], bool]
    ) -> int:
        """Where a chunk that could go on to `end` of `num_tokens` ends: at a point, or with the tokens, else
        with a block if any ends in it. `is_worth_a_step` says of how many tokens computing them again is."""
        sequence = self._sequences[slot]
        for point in sequence.points:
            if start < point < end and (not sequence.answers or is_worth_a_step(point - sequence.saved)):
                return point
        whole = end - end % self._block_size
        return whole if start < whole and end < num_tokens else end

    def is_rest(self, slot: int, start: int, end: int) -> bool:
        """Whether a chunk is what a cut near the prompt's end has left: so short that a step's fixed cost is
        most of what it takes."""
        return start in self._sequences[slot].points and end - start <= TAIL_TOKENS + self._block_size

    def is_saved_at(self, slot: int, position: int) -> bool:
        """Whether a plan that takes the slot's state to `position` is to save it, if there is room."""
        if position % self._block_size:
            return False
        sequence = self._sequences[slot]
        if position in sequence.points:
            return True
        least = (PROGRESS_BLOCKS + slot % PROGRESS_BLOCKS) * self._block_size
        if position - sequence.saved < least:
            return False
        # Those that run leave half of all to conversations that pause.
        return sequence.progress is not None or len(self._keeping) < self.num_snapshots // 2

    def save(self, slot: int, position: int, tokens: HashedTokens) -> int | None:
        """The number under which the plan that is being made saves the slot's state; None: it need not."""
        sequence = self._sequences[slot]
        if position <= tokens.num_tokens:
            known = self._kept.get(tokens.block_hash(position // self._block_size - 1))
            if known is not None:
                known.is_progress = known.is_progress and position not in sequence.points
                self._kept.move_to_end(known.key)
                sequence.saved = position
                return None
            # Known, so this will be kept: the earlier one need not wait for that.
            self._leave_progress(sequence)
        self._give_up_pending(sequence)
        number = self._take_number()
        if number is not None:
            sequence.pending = position, number
            sequence.saved = position
        self._note_keeping(slot)
        return number

    def publish(self, slot: int, tokens: HashedTokens, num_valid: int) -> None:
        """Plans sent so far have saved what is pending, if it is of the first `num_valid`, known tokens."""
        sequence = self._sequences[slot]
        if sequence.pending is None or sequence.pending[0] > num_valid:
            return
        position, number = sequence.pending
        sequence.pending = None
        num_blocks = position // self._block_size
        is_progress = position not in sequence.points
        snapshot = Snapshot(number, tokens.block_hash(num_blocks - 1), num_blocks, is_progress)
        other = self._kept.get(snapshot.key)
        if other is not None:  # another request has computed the same meanwhile
            other.is_progress = other.is_progress and is_progress
            self._kept.move_to_end(other.key)
            self._free.append(number)
        else:
            self._kept[snapshot.key] = snapshot
            sequence.made.append(snapshot)
            self._leave_progress(sequence)
            sequence.progress = snapshot if is_progress else None
        self._note_keeping(slot)

    def release(
        self, slot: int, tokens: HashedTokens, num_valid: int, *, keep: bool, is_proven: bool
    ) -> None:
        """The slot's request is gone from it. With `keep` False what it has saved, and what it began with, is
        forgotten: either may be why it failed. Not so what it began with if it `is_proven`: a token came."""
        sequence = self._sequences[slot]
        if keep:
            self.publish(slot, tokens, num_valid)
        self._give_up_pending(sequence)
        if sequence.progress is not None:
            sequence.progress.is_progress = False
        if not keep:
            suspects = sequence.made
            if sequence.loaded is not None and not is_proven:
                suspects = [*suspects, sequence.loaded]
            for snapshot in suspects:
                self._drop(snapshot)
        del self._sequences[slot]
        self._keeping.discard(slot)

    def take_loads(self) -> tuple[tuple[int, int], ...]:
        """(number, slot) of those that begin with the plan that is being made."""
        loads = tuple(self._loads)
        self._loads.clear()
        return loads

    # Keeping and giving up

    def hold(self, snapshot: Snapshot) -> bool:
        """Keep it until `unhold`, whatever others need. False, and nothing done: `max_held` are held."""
        num_held = sum(kept.num_holds > 0 for kept in self._kept.values())
        if not snapshot.num_holds and num_held >= self.max_held:
            return False
        snapshot.num_holds += 1
        return True

    def unhold(self, snapshot: Snapshot) -> None:
        snapshot.num_holds -= 1

    def clear(self) -> None:
        """Forget all that is not held."""
        for snapshot in [snapshot for snapshot in self._kept.values() if not snapshot.num_holds]:
            self._drop(snapshot)

    def check_integrity(self) -> None:
        """Every number is free, kept or pending, and once; it is known whose are. Raises AssertionError."""
        pending = [seq.pending[1] for seq in self._sequences.values() if seq.pending is not None]
        numbers = [*self._free, *(snapshot.number for snapshot in self._kept.values()), *pending]
        if sorted(numbers) != list(range(self.num_snapshots)):
            raise AssertionError(
                f"of {self.num_snapshots} states {len(self._free)} are free, {len(self._kept)} kept and "
                f"{len(pending)} pending: {sorted(numbers)}"
            )
        keeping = {slot for slot, seq in self._sequences.items() if seq.progress or seq.pending}
        if keeping != self._keeping:
            raise AssertionError(f"slots {keeping} keep states, but {self._keeping} are counted")

    def _take_number(self) -> int | None:
        if self._free:
            return self._free.pop()
        oldest = next((snapshot for snapshot in self._kept.values() if not snapshot.num_holds), None)
        if oldest is None:
            return None
        self._drop(oldest)
        return self._free.pop()

    def _note_keeping(self, slot: int) -> None:
        sequence = self._sequences[slot]
        if sequence.progress is None and sequence.pending is None:
            self._keeping.discard(slot)
        else:
            self._keeping.add(slot)

    def _leave_progress(self, sequence: _Sequence) -> None:
        """It has come further than this."""
        progress, sequence.progress = sequence.progress, None
        if progress is not None and progress.is_progress and not progress.num_holds:
            self._drop(progress)

    def _give_up_pending(self, sequence: _Sequence) -> None:
        if sequence.pending is not None:
            self._free.append(sequence.pending[1])
            sequence.pending = None

    def _drop(self, snapshot: Snapshot) -> None:
        """Forget it, unless that was done before."""
        if self._kept.get(snapshot.key) is snapshot:
            del self._kept[snapshot.key]
            self._free.append(snapshot.number)
