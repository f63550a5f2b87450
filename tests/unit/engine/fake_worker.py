"""A worker in the test's own process that computes a checksum instead of a model.

Its KV cache is a dictionary from cache slot to token, read through the block tables of each plan, so any
mistake of blocks, slots or positions changes the tokens it "samples". It checks the protocol of
mlxd/step.py on the way: a result is given only after one more message came. With snapshots each sequence also
has a state, the tokens that it has seen, which must be those that its blocks hold.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlxd.config import Config
from mlxd.step import (
    BlocksFetched,
    BlocksFound,
    BlocksStored,
    DiskInfo,
    DiskRequest,
    FetchBlocks,
    Flush,
    ForgetStored,
    FromWorker,
    MemoryPlan,
    ModelFiles,
    PlaceBlocks,
    PromptLogprobs,
    Shutdown,
    SlotInit,
    StepPlan,
    StepResult,
    StoreBlocks,
    StoredBlock,
    TokenLogprobs,
    ToWorker,
    WorkerInit,
    WorkerReady,
)

VOCAB_SIZE = 64
EOS = 1


def next_token(tokens: Sequence[int], seed: int) -> int:
    """The token that follows `tokens`; EOS now and then."""
    data = array("i", [seed, *tokens]).tobytes()
    value = zlib.crc32(data)
    return EOS if value % 23 == 0 else 2 + value % (VOCAB_SIZE - 2)


def generate(prompt: Sequence[int], max_tokens: int, seed: int = 0) -> list[int]:
    """What a lone request must produce, EOS included."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens, seed))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def prompt_logprobs(context: Sequence[int], target: int, num_top: int) -> TokenLogprobs:
    """What is said of `target` after `context`; exact in float32."""
    value = zlib.crc32(array("i", [target, *context]).tobytes())
    top = range(num_top)
    return TokenLogprobs(
        -(value % 4096) / 64,
        1 + value % VOCAB_SIZE,
        tuple((value + k) % VOCAB_SIZE for k in top),
        tuple(-(value % 64) / 8 - k for k in top),
    )


def ints(data: bytes) -> list[int]:
    values = array("i")
    values.frombytes(data)
    return values.tolist()


@dataclass
class FakeDisk:
    """What outlives workers: blocks by key, with the tokens that stand for their contents."""

    max_blocks: int = 1000
    block_bytes: int = 1 << 19
    seed: bytes = b"a salt of 16 b\0"
    blocks: dict[bytes, tuple[StoredBlock, list[int]]] = field(default_factory=dict)
    damaged: set[bytes] = field(default_factory=set)
    write_error: str = ""
    read_error: str = ""
    hold: bool = False
    """reads are not answered, until FakeWorker.release_reads"""
    num_reads: int = 0


class FakeWorker:
    """Implements mlxd.engine.executor.Executor."""

    def __init__(
        self,
        config: Config,
        on_message: Callable[[FromWorker], None],
        on_exit: Callable[[int], None],
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 128,
        folder: str = "",
        shares_prefixes: bool = True,
        max_num_seqs: int | None = None,
        disk: FakeDisk | None = None,
        num_snapshots: int = 0,
    ) -> None:
        self.on_message = on_message
        self.on_exit = on_exit
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_model_len = min(max_model_len, (num_blocks - 1) * block_size)
        self.folder = folder
        self.shares_prefixes = shares_prefixes
        self.max_num_seqs = max_num_seqs
        self.disk = disk
        self.num_snapshots = num_snapshots
        self.seconds_per_token = 0.0
        """that chunks take beside a millisecond a step"""
        self._states: dict[int, list[int]] = {}
        self._snapshots: dict[int, list[int]] = {}
        self._fetched: dict[int, list[list[int]]] = {}
        self._held_reads: list[FetchBlocks] = []
        self.plans: list[StepPlan] = []
        self.alive = True
        self.hold = False
        """keep results back until release_held()"""
        self.fail_rows: set[str] = set()
        """request ids that ask for what the worker finds it cannot do"""
        self.nan_rows: set[str] = set()
        """request ids for which the model's output is not a number"""
        self.fail_prompts: set[str] = set()
        """request ids whose prompts' log-probabilities are not numbers"""
        self.max_prompt_rows = 0
        self._kv: dict[int, int] = {}
        self._slots: dict[int, SlotInit] = {}
        self._last_token: dict[int, int] = {}
        self._launched: deque[StepResult] = deque()
        self._held: deque[StepResult] = deque()
        self.pid = 1

    @property
    def is_open(self) -> bool:
        return self.alive

    async def start(self) -> None:
        self.send(WorkerInit(config={}))

    def send(self, message: ToWorker) -> None:
        disk = self.disk
        match message:
            case WorkerInit():
                self._later(ModelFiles(self.folder))
                self._later(
                    WorkerReady(
                        pid=1,
                        model_type="fake",
                        vocab_size=VOCAB_SIZE,
                        max_model_len=self.max_model_len,
                        num_blocks=self.num_blocks,
                        block_size=self.block_size,
                        memory=MemoryPlan(1, 1, 1, 1, 1),
                        device="cpu",
                        attention="none",
                        dtype="none",
                        shares_prefixes=self.shares_prefixes,
                        max_num_seqs=self.max_num_seqs,
                        disk=DiskInfo(disk.max_blocks, disk.block_bytes, disk.seed) if disk else None,
                        num_snapshots=self.num_snapshots,
                    )
                )
                if disk is not None:
                    self._later(BlocksFound(tuple(block for block, _ in disk.blocks.values()), True))
            case StoreBlocks() | FetchBlocks() | PlaceBlocks() | ForgetStored():
                assert disk is not None, "there is no disk"
                self._use(disk, message)
            case StepPlan():
                self.plans.append(message)
                self._launched.append(self._run(message))
                if len(self._launched) == 2:
                    self._give(self._launched.popleft())
                assert len(self._launched) == 1, "more than one step in flight"
            case Flush():
                assert len(self._launched) == 1, "flush without a step in flight"
                self._give(self._launched.popleft())
            case Shutdown():
                self.alive = False

    def _use(self, disk: FakeDisk, message: DiskRequest) -> None:
        match message:
            case StoreBlocks():
                keys = tuple(block.key for block in message.blocks)
                if disk.write_error:
                    self._later(BlocksStored((), keys, {disk.write_error: 1}))
                    return
                for block, block_id in zip(message.blocks, message.block_ids, strict=True):
                    held = [self._kv[block_id * self.block_size + n] for n in range(self.block_size)]
                    assert held == ints(block.token_ids), "a block was stored under other tokens than its own"
                    disk.blocks[block.key] = block, held
                assert len(disk.blocks) <= disk.max_blocks, "the disk is too small for that"
                self._later(BlocksStored(keys))
            case FetchBlocks():
                disk.num_reads += 1
                self._held_reads.append(message)
                if not disk.hold:
                    self.release_reads()
            case PlaceBlocks():
                contents = self._fetched.pop(message.fetch_id)
                for block_id, held in zip(message.block_ids, contents, strict=False):
                    if block_id:
                        for offset, token in enumerate(held):
                            self._kv[block_id * self.block_size + offset] = token
            case ForgetStored():
                for key in message.keys:
                    disk.blocks.pop(key, None)

    def release_reads(self) -> None:
        """Answer the reads held back so far."""
        assert self.disk is not None
        while self._held_reads:
            self._fetch(self.disk, self._held_reads.pop(0))

    def _fetch(self, disk: FakeDisk, message: FetchBlocks) -> None:
        contents: list[list[int]] = []
        errors = {disk.read_error: 1} if disk.read_error else {}
        bad: tuple[bytes, ...] = ()
        for wanted in message.blocks:
            if disk.read_error or wanted.key in disk.damaged or wanted.key not in disk.blocks:
                bad = (wanted.key,)
                errors = errors or {"damaged": 1}
                disk.blocks.pop(wanted.key, None)
                break
            block, held = disk.blocks[wanted.key]
            assert block == wanted
            contents.append(held)
        self._fetched[message.fetch_id] = contents
        self._later(BlocksFetched(message.fetch_id, len(contents), bad, errors))

    def kill(self) -> None:
        self.die()

    async def stop(self) -> None:
        self.alive = False

    def die(self) -> None:
        """The process is gone."""
        if self.alive:
            self.alive = False
            asyncio.get_running_loop().call_soon(self.on_exit, -9)

    def release_held(self) -> None:
        self.hold = False
        while self._held:
            self._later(self._held.popleft())

    def _give(self, result: StepResult) -> None:
        if self.hold:
            self._held.append(result)
        else:
            self._later(result)

    def _later(self, message: FromWorker) -> None:
        asyncio.get_running_loop().call_soon(self._deliver, message)

    def _deliver(self, message: FromWorker) -> None:
        if self.alive:
            self.on_message(message)

    def _run(self, plan: StepPlan) -> StepResult:
        for slot in plan.release:
            del self._slots[slot]
            self._last_token.pop(slot, None)
            self._states.pop(slot, None)
        for init in plan.admit:
            assert init.slot not in self._slots, "a slot was given away twice"
            self._slots[init.slot] = init
            self._states[init.slot] = []
        for snapshot, slot in plan.load_states:
            self._states[slot] = list(self._snapshots[snapshot])
        assert not (self.num_snapshots and plan.copy_blocks), "a copied block has no state beside it"
        for source, destination in plan.copy_blocks:
            assert source and destination, "the null block was copied"
            for offset in range(self.block_size):
                kept = self._kv.get(source * self.block_size + offset)
                if kept is not None:
                    self._kv[destination * self.block_size + offset] = kept
        slots, query_lens, context_lens = ints(plan.slots), ints(plan.query_lens), ints(plan.context_lens)
        assert len(set(slots)) == len(slots), "two rows of one request in a step"
        mapping, joined = ints(plan.slot_mapping), deque(ints(plan.block_tables))
        tables = [[joined.popleft() for _ in range(-(-n // self.block_size))] for n in context_lens]
        assert not joined, "more blocks than the contexts have"
        chunk_tokens = deque(ints(plan.token_ids))
        written = 0
        writers: dict[int, int] = {}
        for row, slot in enumerate(slots):
            for n in range(query_lens[row]):
                position = context_lens[row] - query_lens[row] + n
                token = self._last_token[slot] if row < plan.num_decode_rows else chunk_tokens.popleft()
                table = tables[row]
                where = table[position // self.block_size] * self.block_size + position % self.block_size
                assert where == mapping[written], "slot mapping disagrees with the block table"
                assert where >= self.block_size, "a token was written to the null block"
                assert writers.setdefault(where, slot) == slot, "two rows write one place"
                self._kv[where] = token
                assert not self.num_snapshots or len(self._states[slot]) == position, "the state is elsewhere"
                self._states[slot].append(token)
                written += 1
        assert written == len(mapping) and not chunk_tokens
        for slot, snapshot in plan.save_states:
            assert 0 <= snapshot < self.num_snapshots and slot in slots
            self._snapshots[snapshot] = list(self._states[slot])
        sampled, logprobs, errors = array("i"), [], []
        for row, slot in enumerate(slots):
            if not plan.sample[row]:
                continue
            init = self._slots[slot]
            table = tables[row]
            context = [
                self._kv[table[p // self.block_size] * self.block_size + p % self.block_size]
                for p in range(context_lens[row])
            ]
            assert not self.num_snapshots or self._states[slot] == context, "the state is of other tokens"
            token = next_token(context, init.sampling.seed)
            if init.request_id in self.fail_rows:
                errors.append((len(sampled), "told to fail"))
                token = -1
            if init.request_id in self.nan_rows:
                token = -1
            self._last_token[slot] = token
            sampled.append(token)
            logprobs.append(TokenLogprobs(-0.5, 1) if init.sampling.logprobs >= 0 else None)
        found = []
        for asked in plan.prompt_rows:
            slot, table = slots[asked.row], tables[asked.row]
            first = context_lens[asked.row] - query_lens[asked.row] + asked.start
            assert first + asked.num_tokens <= context_lens[asked.row], "asked beyond the chunk"
            for offset, target in enumerate(ints(asked.token_ids)):
                context = [
                    self._kv[table[p // self.block_size] * self.block_size + p % self.block_size]
                    for p in range(first + offset + 1)
                ]
                entry = prompt_logprobs(context, target, max(row.num_top for row in plan.prompt_rows))
                if self._slots[slot].request_id in self.fail_prompts:
                    entry = TokenLogprobs(math.nan, 1, entry.top_token_ids, entry.top_logprobs)
                found.append(entry)
        self.max_prompt_rows = max(self.max_prompt_rows, len(found))
        return StepResult(
            step_id=plan.step_id,
            token_ids=sampled.tobytes(),
            logprobs=tuple(logprobs) if any(logprobs) else (),
            row_errors=tuple(errors),
            step_seconds=0.001 + self.seconds_per_token * len(ints(plan.token_ids)),
            prompt_logprobs=pack(found) if found else None,
        )


def pack(entries: Sequence[TokenLogprobs]) -> PromptLogprobs:
    """As a worker sends them."""
    return PromptLogprobs(
        num_top=len(entries[0].top_token_ids),
        logprobs=array("f", [entry.logprob for entry in entries]).tobytes(),
        ranks=array("i", [entry.rank for entry in entries]).tobytes(),
        top_token_ids=array("i", [i for entry in entries for i in entry.top_token_ids]).tobytes(),
        top_logprobs=array("f", [value for entry in entries for value in entry.top_logprobs]).tobytes(),
    )
