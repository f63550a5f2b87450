"""The contract between engine and worker: what travels over the socketpair, both ways.

It knows neither asyncio nor MLX. Frames are a little-endian uint32 length and a msgpack message.

The front sends `WorkerInit` once, then `StepPlan`s and `Flush`es. The worker answers with `Progress`,
`ModelFiles` and `WorkerReady` while it loads, then with exactly one `StepResult` a plan, in order, and a
`Heartbeat` a second from a thread of its own. `WorkerFailure` is its last word.

One step is in flight: having launched plan N, the worker reads one more message before it waits for N's
tokens. That message is plan N+1 (whose decode rows take the token N samples, which never leaves the device)
or `Flush` (nothing to run before N's result is known). So the front, after it has sent plan N and has not
sent N+1, owes the worker one message.

With a disk tier (`WorkerReady.disk`) there are messages about stored blocks: `StoreBlocks`, `FetchBlocks`,
`PlaceBlocks` and `ForgetStored`, each answered, save the last two, by `BlocksStored` or `BlocksFetched`. They
may come at any time, are no steps, and do not count as the message that the front owes. What they do to the
pool is in order with the plans around them; files are read and written by threads of their own.

Integer arrays travel as bytes, int32 little-endian, C order. R is the number of rows (requests) of a step,
D of them decode rows, which come first; N = sum(query_lens) is the number of tokens.
"""

from __future__ import annotations

from typing import Literal

import msgspec

NULL_BLOCK = 0
"""Block 0 belongs to nobody: scratch for rows that fill up a batch, and what fills up their tables."""

PROTOCOL_VERSION = 4
HEADER_BYTES = 4
MAX_MESSAGE_BYTES = 256 * 1024 * 1024

MIN_PROMPT_ROWS = 32
"""Positions of prompts whose logits a step may always compute, however many rows sample."""

MAX_FORCED_BYTES = 16384
"""Of a text about which its grammar leaves no choice, from any place on: what is still to come of it is
looked through at every token, while everybody in the step waits. 16,000 take 4 ms."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of everything that crosses the socketpair."""


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a row's output must obey; the front has checked that it compiles.

    `grammar` is llguidance's: a JSON text with `grammars`. The output must match it whole: tokens that end
    the request (`stop_token_ids`, the engine's to fill) can be sampled only where the grammar may end, and
    nothing else can where it must.

    With `triggers`, any text may come until one of them has been produced; the grammar holds for what follows
    it, less some white space. If the grammar `repeats`, it begins with the trigger (so that it can tell what
    follows which), and the output is free again when it has ended, until the next trigger.
    `opening_token_ids` make an exception to a grammar that holds from the beginning: an output that begins
    with one of these is free up to a trigger.
    """

    grammar: str
    triggers: tuple[str, ...] = ()
    repeats: bool = False
    opening_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a row samples, already validated and resolved against all defaults.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0, repetition_penalty 1, presence and frequency 0 are
    off. The penalties are vLLM's: repetition over prompt and output tokens, presence and frequency over
    output tokens. `seed` is always set (the engine draws one when the client gave none), so that a replay
    repeats the tokens. `logprobs` is -1 for none, else the number of alternatives (0: the sampled one only);
    log-probabilities are of the model's raw distribution, before temperature, bias and penalties.
    While fewer than `min_tokens` tokens are out, `stop_token_ids` (end-of-sequence ids among them) cannot be
    sampled, unless the grammar allows nothing else.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1
    grammar: GrammarSpec | None = None

    @property
    def needs_token_history(self) -> bool:
        """Whether the penalties must know the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class SlotInit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request takes a slot. Sent with the first plan that has a row for it, also after preemption.

    `token_ids` (int32) holds the prompt and the tokens sampled so far, and only where
    `sampling.needs_token_history` or there is a grammar; else it is empty.
    """

    slot: int
    request_id: str
    num_prompt_tokens: int
    sampling: SamplingParams
    token_ids: bytes = b""


class PromptRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Of row `row`, the log-probabilities of prompt tokens are wanted too.

    The chunk's tokens `start`, `start` + 1, …, counted from its first, predict `token_ids`: the prompt tokens
    that follow them, of which the last may be in no chunk yet.
    """

    row: int
    start: int
    token_ids: bytes
    """int32, at least one"""
    num_top: int
    """alternatives; 0: the tokens themselves only"""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4


class StepPlan(Message, frozen=True, tag="step"):
    """One forward over N tokens of R requests. The worker holds no other truth than these.

    The order in the worker: `release`, `admit`, `load_states`, `copy_blocks`, the forward, `save_states`.
    Row r writes its query_lens[r] tokens at positions context_lens[r] - query_lens[r] … context_lens[r] - 1
    and attends to positions 0 … its own. A decode row's one input token is the token sampled last in its
    slot; the other rows' tokens lie one after another in `token_ids`.
    """

    step_id: int
    num_decode_rows: int
    slots: bytes
    """int32 [R]"""
    query_lens: bytes
    """int32 [R]"""
    context_lens: bytes
    """int32 [R]: tokens of the row that the KV cache holds after this step"""
    sample: bytes
    """uint8 [R]: 1 where a token is sampled from the row's last position (decode rows always)"""
    token_ids: bytes
    """int32 [N - D]"""
    slot_mapping: bytes
    """int32 [N]: block_id * block_size + offset where token n's keys and values go"""
    block_tables: bytes
    """int32, one table after another: of row r the first ceil(context_lens[r] / block_size) blocks"""
    release: tuple[int, ...] = ()
    """slots whose request is gone"""
    admit: tuple[SlotInit, ...] = ()
    copy_blocks: tuple[tuple[int, int], ...] = ()
    """(source, destination) block ids, copied in every layer before the forward"""
    prompt_rows: tuple[PromptRow, ...] = ()
    load_states: tuple[tuple[int, int], ...] = ()
    """(snapshot, slot): the slot's sequence goes on from this state, with tokens that follow those that the
    state has seen. Only with `WorkerReady.num_snapshots`, as below"""
    save_states: tuple[tuple[int, int], ...] = ()
    """(slot, snapshot): kept is the slot's state as this step leaves it, in place of what was under that
    number. Whoever has loaded that goes on from it nevertheless: a state is replaced, never changed"""


class Flush(Message, frozen=True, tag="flush"):
    """No plan before the result that is outstanding."""


class Shutdown(Message, frozen=True, tag="shutdown"):
    """Finish what is in flight and exit with 0."""


class StoredBlock(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A full block as the disk knows it: whoever finds it verifies that these are the tokens it wants.

    `key` is the chained hash at its end and `parent` the one before it (of the first block: the salt), 16
    bytes each (ext/hashed_tokens.pyx says why hash and tokens together suffice). `token_ids` is int32
    [block_size].
    """

    key: bytes
    parent: bytes
    token_ids: bytes


class StoreBlocks(Message, frozen=True, tag="store"):
    """Copy these blocks, as they are once the plans sent so far have run, and write them to disk."""

    blocks: tuple[StoredBlock, ...]
    block_ids: tuple[int, ...]


class FetchBlocks(Message, frozen=True, tag="fetch"):
    """Read these blocks from disk and keep them until `PlaceBlocks`."""

    fetch_id: int
    blocks: tuple[StoredBlock, ...]


class PlaceBlocks(Message, frozen=True, tag="place"):
    """Put what was fetched into the pool, before the next plan, and forget it.

    One block id for each of the fetch's leading blocks: NULL_BLOCK for some that are not wanted, at the
    beginning, then those that are.
    """

    fetch_id: int
    block_ids: tuple[int, ...] = ()


class ForgetStored(Message, frozen=True, tag="forget"):
    """Delete these blocks' files."""

    keys: tuple[bytes, ...]


Role = Literal["generate", "embed"]


class WorkerInit(Message, frozen=True, tag="init"):
    """The first message: what to load and how. `config` is the whole `mlxd.config.Config` as builtins.

    A worker of role `embed` loads `embeddings.model`, answers `EmbedderReady`, and then each `EmbedBatch`
    with one `EmbedResult`, in order, whenever they come.
    """

    config: dict[str, object]
    protocol_version: int = PROTOCOL_VERSION
    role: Role = "generate"


class Progress(Message, frozen=True, tag="progress"):
    """Something slow moved. `stage` is resolve, download, convert, load, warmup; total 0 when unknown."""

    stage: str
    done: int
    total: int
    unit: str = ""
    detail: str = ""


class ModelFiles(Message, frozen=True, tag="files"):
    """The folder with config.json and the tokenizer is on disk; the front may read it now."""

    path: str


class MemoryPlan(msgspec.Struct, frozen=True, array_like=True):
    """Bytes, as planned before the pool was allocated."""

    device_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_pool_bytes: int
    kv_bytes_per_token: int
    state_bytes: int = 0
    """of recurrent layers, for all sequences that may run at once"""
    snapshot_bytes: int = 0
    """of such states that are kept for later requests"""


class DiskInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The disk tier as it was opened."""

    max_blocks: int
    block_bytes: int
    """that a stored block takes, its file's header included"""
    seed: bytes
    """secret and lasting: what salts follow from, so that keys mean the same after a restart; 16 of them"""


class WorkerReady(Message, frozen=True, tag="ready"):
    """Loaded, checked and warmed up: plans are welcome."""

    pid: int
    model_type: str
    vocab_size: int
    max_model_len: int
    """the model's own limit in tokens, cut to what the configuration and the pool allow"""
    num_blocks: int
    """including NULL_BLOCK"""
    block_size: int
    memory: MemoryPlan
    device: str
    """cpu, metal or cuda, with its name"""
    attention: str
    """gather, kernel, …"""
    dtype: str
    versions: dict[str, str] = {}
    warnings: tuple[str, ...] = ()
    shares_prefixes: bool = True
    """whether a sequence may begin with blocks that others filled"""
    enforces_grammars: bool = True
    """Playback says what it was told to, so tokens that a grammar would force are not said for it."""
    max_num_seqs: int | None = None
    """sequences that can run at once, where memory allows fewer than are configured"""
    disk: DiskInfo | None = None
    """None: no disk tier, because none was asked for or it cannot be had (then there is a warning)"""
    num_snapshots: int = 0
    """Where it is not 0, sequences have a state outside of their blocks, and begin with those of others only
    with the state that was saved where they end: so many can be, under the numbers 0, 1, …"""


class BlocksFound(Message, frozen=True, tag="found"):
    """Some of what was on disk when the worker started, last used first; `complete` with the last of it."""

    blocks: tuple[StoredBlock, ...]
    complete: bool
    errors: dict[str, int] = {}


class BlocksStored(Message, frozen=True, tag="stored"):
    """The answer to one StoreBlocks: which are on disk now. `errors` counts what went wrong, by kind."""

    keys: tuple[bytes, ...]
    failed: tuple[bytes, ...] = ()
    errors: dict[str, int] = {}


class BlocksFetched(Message, frozen=True, tag="fetched"):
    """The answer to one FetchBlocks: its leading `num_blocks` blocks can be placed.

    `bad` are keys that cannot be had, now or later. Kinds of `errors`: `missing`, `truncated`, `damaged`
    (checksum), `foreign` (another model, version or format), `misplaced` (another block's file), `read` (the
    system's error), `slow`.
    """

    fetch_id: int
    num_blocks: int
    bad: tuple[bytes, ...] = ()
    errors: dict[str, int] = {}


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities (natural) at one position. `rank` of the sampled token counts from 1."""

    logprob: float
    rank: int
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities (natural) of the T tokens of a plan's `prompt_rows`, one row after another.

    K, the number of alternatives, is the largest that a row asked for; they come best first.
    """

    num_top: int
    """K"""
    logprobs: bytes
    """float32 [T]; NaN where the model's output is not a number"""
    ranks: bytes
    """int32 [T], from 1"""
    top_token_ids: bytes
    """int32 [T, K]"""
    top_logprobs: bytes
    """float32 [T, K]"""


class StepResult(Message, frozen=True, tag="result"):
    """What plan `step_id` sampled, in the order of its rows with sample = 1, and what its prompt_rows ask."""

    step_id: int
    token_ids: bytes
    """int32; -1 where the row failed"""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """empty when no row asked, else one entry a sampled row"""
    row_errors: tuple[tuple[int, str], ...] = ()
    """(index among the sampled rows, a message that may be shown to the client): the request asks for what
    cannot be done. In a row that failed without one the model's output is not a number"""
    step_seconds: float = 0.0
    """from the launch of this step, or the end of the one before if later, to its tokens"""
    active_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    cache_memory_bytes: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    """None when the plan had no prompt_rows"""


class EmbedBatch(Message, frozen=True, tag="embed"):
    """B sequences, the longest first, for one forward."""

    batch_id: int
    lengths: bytes
    """int32 [B]"""
    token_ids: bytes
    """int32 [sum of lengths], one sequence after another"""
    num_prompt_tokens: bytes = b""
    """int32 [B]: leading tokens that pooling leaves out if the model wants that; empty: none"""
    token_types: bytes = b""
    """uint8, as token_ids: 1 for the second text of a pair; empty: all 0"""


class EmbedResult(Message, frozen=True, tag="embedded"):
    """What batch `batch_id` came to, in its order."""

    batch_id: int
    vectors: bytes
    """float32 [B, size]; a cross-encoder's are scores"""
    seconds: float = 0.0
    active_memory_bytes: int = 0


class EmbedderReady(Message, frozen=True, tag="embedder"):
    """Loaded and warmed up: batches are welcome."""

    pid: int
    model_type: str
    vocab_size: int
    max_model_len: int
    """the model's own limit in tokens, or embeddings.max_model_len"""
    size: int
    """numbers a vector; 1 for a cross-encoder"""
    is_cross_encoder: bool
    device: str
    dtype: str
    versions: dict[str, str] = {}
    warnings: tuple[str, ...] = ()


class Heartbeat(Message, frozen=True, tag="beat"):
    """From a thread of its own, once a second. `busy_seconds`: how long the step now running has taken."""

    step_id: int
    busy_seconds: float
    active_memory_bytes: int = 0


class WorkerFailure(Message, frozen=True, tag="failure"):
    """The worker is about to exit. `fatal`: the operator must change something (no such model, …), so a
    restart would fail in the same way."""

    message: str
    fatal: bool


DiskRequest = StoreBlocks | FetchBlocks | PlaceBlocks | ForgetStored
DiskReport = BlocksFound | BlocksStored | BlocksFetched
ToWorker = WorkerInit | StepPlan | EmbedBatch | Flush | Shutdown | DiskRequest
FromWorker = (
    Progress
    | ModelFiles
    | WorkerReady
    | StepResult
    | DiskReport
    | EmbedderReady
    | EmbedResult
    | Heartbeat
    | WorkerFailure
)
