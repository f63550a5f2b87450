"""The engine: takes requests, and sees each one to its end whatever becomes of clients and workers.

It does not know HTTP, dialects, templates or MLX. Everything here runs on the event loop's thread, in
callbacks; a submission, a result and an abort each end in the worker's pump, which sends what can be sent.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from mlxd.config import Config
from mlxd.engine.admission import check_prompt, check_queue, resolve
from mlxd.engine.disk_tier import DiskTier
from mlxd.engine.executor import ProcessExecutor
from mlxd.engine.kv_manager import KvManager
from mlxd.engine.loop_monitor import LoopMonitor
from mlxd.engine.output_processor import STATUS_OF, end_early
from mlxd.engine.pins import PinBoard
from mlxd.engine.prefix_report import PrefixReport
from mlxd.engine.request import FinishReason, GenerationRequest, Request
from mlxd.engine.request_log import EndedRequest, RequestLog, is_of
from mlxd.engine.results import StepResults
from mlxd.engine.scheduler import Scheduler
from mlxd.engine.stats import EngineStats
from mlxd.engine.status import describe, describe_cache, describe_sequences, ended_figures
from mlxd.engine.step_pump import StepPump
from mlxd.engine.stream import OutputStream
from mlxd.engine.supervisor import MakeExecutor, WorkerState, WorkerSupervisor
from mlxd.engine.text_loader import TextLoader
from mlxd.engine.worker_deaths import count_death
from mlxd.errors import GenerationTimeout, MlxdError, NotReadyError
from mlxd.step import DiskReport, Heartbeat, Progress, StepResult, WorkerReady
from mlxd.step import ModelFiles as ModelFilesMessage
from mlxd.text.model_files import ModelFiles
from mlxd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CLEARED_AT_ONCE = 4096
"""Blocks of the cache; a millisecond"""


class Engine:
    """One model, one worker, many requests.

    `on_progress` is told of loading; `on_ready` when requests are welcome (again); `on_failed` when there
    will be no worker any more (a ConfigError: because of what the operator can change).
    """

    def __init__(
        self,
        config: Config,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_ready: Callable[[WorkerReady], None] | None = None,
        on_failed: Callable[[MlxdError], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = lambda: random.getrandbits(63),
        make_executor: MakeExecutor = ProcessExecutor,
    ) -> None:
        self.config = config
        self.files: ModelFiles | None = None
        self.tokenizer: Tokenizer | None = None
        self.info: WorkerReady | None = None
        self.stats = EngineStats()
        self.ended = RequestLog()
        self.loop_monitor = LoopMonitor()
        self.pins = PinBoard(self)
        self._ready_listeners: list[Callable[[], None]] = []
        self.supervisor = WorkerSupervisor(
            config,
            self,
            ready=WorkerReady,
            result=StepResult,
            clock=clock,
            make_executor=make_executor,
            on_disk_report=self.on_disk_report,
        )
        self._tell_progress = on_progress
        self._tell_ready = on_ready
        self._tell_failed = on_failed
        self._clock = clock
        self._draw_seed = draw_seed
        self._start_time = clock()
        self._stopping = False
        self._eos_token_ids: tuple[int, ...] = ()
        self._results = StepResults(self.stats, clock, finish=self._finish, end_early=self._end_early)
        self._pump: StepPump | None = None
        """of the worker that is ready, while there is one"""
        self._cache_seed = draw_seed()
        self._requests: dict[str, Request] = {}
        self._timers: dict[OutputStream, asyncio.TimerHandle] = {}
        self._waiting_for_worker: list[Request] = []
        self._news = asyncio.Event()
        """set when requests are welcome again or never will be"""
        self._text_loader = TextLoader(self._read_text, on_loaded=self._on_text, on_failed=on_failed)
        self._idle = asyncio.Event()
        self._idle.set()

    # Life

    async def start(self) -> None:
        """Start the worker; returns at once, the model loads in the background."""
        self.loop_monitor.start()
        await self.supervisor.start()

    async def stop(self, drain_seconds: float) -> None:
        """Take no more requests, give the running ones `drain_seconds`, end the rest, stop the worker."""
        self._stopping = True
        self._news.set()
        error = NotReadyError("the server is shutting down")
        for request in self.requests():
            if request.params.background:
                self._end_early(request, FinishReason.ABORT, error)
        try:
            await asyncio.wait_for(self._idle.wait(), drain_seconds)
        except TimeoutError:
            self.abort_all(error)
        self.pins.stop()
        self.check_integrity()
        await self.supervisor.stop()
        self.loop_monitor.stop()
        if self._pump is not None:
            self._pump.close()
        self._text_loader.stop()

    def end_all(self, error: MlxdError) -> None:
        """Take no more requests, not even if their prompts are being read, and end all with `error`."""
        self._stopping = True
        self._news.set()
        self.abort_all(error)

    def check_ready(self) -> None:
        """Raises NotReadyError with the reason unless requests can be taken."""
        if self._stopping:
            raise NotReadyError("the server is shutting down")
        state = self.supervisor.state
        if state is WorkerState.FAILED:
            raise NotReadyError("the model could not be loaded or its worker kept failing", retry_after=60)
        if state is WorkerState.RESTARTING:
            raise NotReadyError("the worker is restarting")
        if self.scheduler is None or self.tokenizer is None or state is not WorkerState.READY:
            raise NotReadyError("the model is loading")

    async def until_ready(self) -> None:
        """Wait for the worker that is on its way. Raises NotReadyError where none is."""
        while True:
            try:
                return self.check_ready()
            except NotReadyError:
                if self._stopping or self.supervisor.state is WorkerState.FAILED:
                    raise
            self._news.clear()
            await self._news.wait()

    def health(self) -> tuple[bool, str]:
        """Whether the worker lives and moves; else the reason."""
        return self.supervisor.health()

    # Requests

    def submit(
        self, requests: Sequence[GenerationRequest], *, timeout_from: float | None = None
    ) -> OutputStream:
        """Take `requests` together, or none of them.

        Their time runs since `timeout_from`, by the event loop's clock; None: since now.
        Returns the stream of their outputs. Raises NotReadyError, ContextLengthExceeded,
        InvalidRequestError (token ids out of range) or OverloadedError.
        """
        self.check_ready()
        scheduler, info, tokenizer = self.scheduler, self.info, self.tokenizer
        assert scheduler is not None and info is not None and tokenizer is not None
        # Choices of one prompt share its list.
        for params in {id(params.prompt_token_ids): params for params in requests}.values():
            check_prompt(params, info)
        if not requests[0].background:
            check_queue(requests, scheduler.waiting, self.config.scheduler, self.stats)
        loop = asyncio.get_running_loop()
        stream = OutputStream(len(requests), loop, on_cancel=self._on_cancel, on_drained=self._on_drained)
        now = self._clock()
        for params in requests:
            own_eos = () if params.ignore_eos else (*self._eos_token_ids, *params.end_token_ids)
            stop_token_ids = frozenset((*own_eos, *params.stop_token_ids))
            request = Request(
                resolve(
                    params,
                    stop_token_ids,
                    seed=self._draw_seed() if params.seed is None else params.seed,
                    enforces_grammars=info.enforces_grammars,
                ),
                stream=stream,
                detokenizer=tokenizer.detokenizer(
                    skip_special_tokens=params.skip_special_tokens, prompt_token_ids=params.prompt_token_ids
                ),
                stop_token_ids=stop_token_ids,
                max_tokens=min(params.max_tokens, info.max_model_len - len(params.prompt_token_ids)),
                arrival_time=now,
            )
            self._requests[params.request_id] = request
            scheduler.add(request)
            if not params.background:
                self.stats.num_prompt_tokens += request.num_prompt_tokens
        timeout = requests[0].timeout_seconds or self.config.limits.timeout_seconds
        start = loop.time() if timeout_from is None else timeout_from
        self._timers[stream] = loop.call_at(start + timeout, self._on_timeout, stream, timeout)
        self._idle.clear()
        self._pump_soon()
        return stream

    def abort(self, request_id: str, client: str | None = None) -> bool:
        """End the request `request_id` and the choices `request_id-…`, of `client` or, if None, of anybody.

        False when there is none.
        """
        found = self.find(request_id, client)
        for request in found:
            self._end_early(request, FinishReason.ABORT, None)
        return bool(found)

    def abort_all(self, error: MlxdError) -> None:
        """End every request; each stream's last outputs carry `error`."""
        for request in list(self._requests.values()):
            self._end_early(request, FinishReason.ABORT, error)

    def requests(self) -> list[Request]:
        """The unfinished requests, oldest first."""
        return list(self._requests.values())

    def find(self, request_id: str, client: str | None = None) -> list[Request]:
        """Of these, `request_id`, by either of its ids, and the choices `request_id-…`; of `client` or, if
        None, of anybody."""
        return [
            request
            for key, request in self._requests.items()
            if is_of(key, request_id, request.params.also_known_as)
            and client in (None, request.params.client)
        ]

    @property
    def scheduler(self) -> Scheduler | None:
        """That of the worker that is ready, while there is one."""
        return None if self._pump is None else self._pump.scheduler

    async def status(self) -> dict[str, object]:
        """What /v1/status says."""
        return await describe(self)

    def describe_sequences(self, request_id: str, client: str | None = None) -> list[dict[str, object]]:
        """The same of the sequences that `find` finds, and of those that ended not too long ago."""
        return describe_sequences(self, request_id, client)

    @property
    def num_preemptions(self) -> int:
        """Since start, whichever worker it was."""
        return self.stats.num_preemptions + (self.scheduler.num_preemptions if self.scheduler else 0)

    @property
    def uptime_seconds(self) -> float:
        return self._clock() - self._start_time

    def cache_status(self) -> dict[str, object]:
        """What /v1/cache/stats says."""
        return describe_cache(self)

    @property
    def shares_prefixes(self) -> bool:
        """Whether requests reuse what others have computed."""
        return self.scheduler is not None and self.scheduler.kv.prefix_caching

    @property
    def keeps_states(self) -> bool:
        """Whether they do so only up to places where the state of recurrent layers was kept."""
        return self.scheduler is not None and self.scheduler.kv.states is not None

    def num_cached_tokens(self, token_ids: list[int], cache_salt: str) -> int:
        """How many of the first of `token_ids` a request with that salt could reuse now."""
        return 0 if self.scheduler is None else self.scheduler.kv.num_cached_tokens(token_ids, cache_salt)

    async def clear_cache(self) -> int:
        """Forget every cached block that nobody holds, and all on disk; returns how many were in memory.

        The loop goes on meanwhile, and what is cached meanwhile stays.
        """
        scheduler = self.scheduler
        if scheduler is None:
            return 0
        scheduler.clear_disk()
        self._pump_soon()
        if scheduler.kv.states is not None:
            scheduler.kv.states.clear()
        left, num_cleared = scheduler.kv.index.num_evictable, 0
        while left > 0 and scheduler is self.scheduler:
            num_cleared += scheduler.kv.clear(min(left, CLEARED_AT_ONCE))
            left -= CLEARED_AT_ONCE
            await asyncio.sleep(0)
        return num_cleared

    def on_each_ready(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever requests are welcome again, for the first time too."""
        self._ready_listeners.append(listener)

    def now(self) -> float:
        """The engine's clock, in seconds; requests' times are of this clock."""
        return self._clock()

    def check_integrity(self) -> None:
        """Look for leaks, if the engine has become idle since the last look and still is."""
        if self._pump is not None:
            self._pump.check_integrity()

    # What the worker says (WorkerListener)

    def on_progress(self, progress: Progress) -> None:
        if self._tell_progress is not None:
            self._tell_progress(progress)

    def on_heartbeat(self, beat: Heartbeat) -> None:
        if beat.active_memory_bytes:  # steps tell it too, but who has just loaded a model makes none
            self.stats.active_memory_bytes = beat.active_memory_bytes
            self.stats.peak_memory_bytes = max(self.stats.peak_memory_bytes, beat.active_memory_bytes)

    def on_model_files(self, files: ModelFilesMessage) -> None:
        self._text_loader.load(Path(files.path))

    def on_worker_ready(self, info: WorkerReady) -> None:
        config = self.config.scheduler
        if info.max_num_seqs is not None:
            config = msgspec.structs.replace(config, max_num_seqs=info.max_num_seqs)
        disk = None
        if info.disk is not None:
            disk = DiskTier(info.disk, info.block_size, info.num_blocks, self.stats.disk)
        kv = KvManager(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=info.max_model_len,
            prefix_caching=self.config.cache.prefix_caching and info.shares_prefixes,
            seed=self._cache_seed if info.disk is None else int.from_bytes(info.disk.seed, "little"),
            second_tier=disk,
            num_snapshots=info.num_snapshots,
        )
        scheduler = Scheduler(config, kv, disk)
        for request in self._waiting_for_worker:
            scheduler.add(request)
        self._waiting_for_worker.clear()
        self.info = info
        self._pump = StepPump(
            scheduler,
            self._results,
            self.stats,
            clock=self._clock,
            send=self.supervisor.send,
            is_listening=lambda: self.supervisor.is_listening,
            on_admitted=self._report_prefix,
            make_room=self.pins.give_way,
        )
        self._become_ready()

    def on_worker_lost(self) -> None:
        pump, self._pump = self._pump, None
        if pump is None:
            return
        pump.close()
        scheduler = pump.scheduler
        self.stats.num_preemptions += scheduler.num_preemptions
        self.stats.num_evicted_blocks += scheduler.kv.num_evicted_blocks
        self.pins.on_worker_lost()
        for request, error in count_death(scheduler, pump.in_flight):
            self._end_early(request, FinishReason.ERROR, error, scheduler)
        self.stats.num_resumed += len(scheduler.running)
        for request in [*scheduler.running, *scheduler.waiting]:
            request.lose_worker()
            self._waiting_for_worker.append(request)

    def on_worker_failed(self, error: MlxdError) -> None:
        self.on_worker_lost()
        self.abort_all(NotReadyError("the model worker failed", retry_after=60))
        self._news.set()
        if self._tell_failed is not None:
            self._tell_failed(error)

    def on_result(self, result: StepResult) -> None:
        if self._pump is None or not self._pump.on_result(result):
            self.supervisor.kill(f"result {result.step_id} answers no plan")

    def on_disk_report(self, report: DiskReport) -> None:
        if self._pump is not None:
            self._pump.on_disk_report(report)

    # Within

    def _read_text(self, folder: Path) -> tuple[ModelFiles, Tokenizer]:
        files = ModelFiles.read(folder, self.config.model.chat_template)
        return files, Tokenizer.load(files, trust_remote_code=self.config.model.trust_remote_code)

    def _on_text(self, loaded: tuple[ModelFiles, Tokenizer]) -> None:
        self.files, self.tokenizer = files, tokenizer = loaded
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._eos_token_ids = (*files.eos_token_ids, *own)
        self._become_ready()

    def _become_ready(self) -> None:
        if self.scheduler is not None and self.tokenizer is not None and self.info is not None:
            if self._tell_ready is not None:
                self._tell_ready(self.info)
            self._news.set()
            self.pins.on_worker_ready()
            for listener in self._ready_listeners:
                listener()
            self._pump_soon()

    def _pump_soon(self) -> None:
        if self._pump is not None:
            self._pump.pump_soon()

    def _report_prefix(self, request: Request) -> None:
        """The worker has its plan: time to note what the cache had."""
        if request.prefix_report is None:
            assert self.tokenizer is not None, "nothing is submitted before it is there"
            explain = self.config.cache.explain_misses
            request.prefix_report = PrefixReport.of(request, self.tokenizer.decode, explain=explain)
            if not request.params.background:
                self.stats.count_admitted(request)

    def _finish(self, request: Request, reason: FinishReason, scheduler: Scheduler | None) -> None:
        """The request's last output is out: give back all it holds."""
        now = self._clock()
        if scheduler is not None:
            scheduler.finish(request, STATUS_OF[reason])
        else:
            self._waiting_for_worker.remove(request)
            request.status = STATUS_OF[reason]
        del self._requests[request.request_id]
        if not self._requests:
            self._idle.set()
        if request.params.background:
            self.stats.count_background(reason)
        else:
            self.stats.count_finished(request, reason, now)
            figures = ended_figures(request, reason, now)
            params, report = request.params, request.prefix_report
            ended = EndedRequest(params.request_id, params.client, figures, report, params.also_known_as)
            self.ended.add(ended)
        if request.stream.is_finished:
            timer = self._timers.pop(request.stream, None)
            if timer is not None:
                timer.cancel()

    def _end_early(
        self,
        request: Request,
        reason: FinishReason,
        error: Exception | None,
        scheduler: Scheduler | None = None,
    ) -> None:
        end_early(request, reason, error)
        self._finish(request, reason, scheduler or self.scheduler)
        self._pump_soon()

    def _of_stream(self, stream: OutputStream) -> list[Request]:
        return [r for r in self._requests.values() if r.stream is stream]

    def _on_cancel(self, stream: OutputStream) -> None:
        for request in self._of_stream(stream):
            self._end_early(request, FinishReason.ABORT, None)

    def _on_timeout(self, stream: OutputStream, seconds: float) -> None:
        error = GenerationTimeout(f"the request took longer than {seconds:g} s")
        for request in self._of_stream(stream):
            self._end_early(request, FinishReason.ABORT, error)

    def _on_drained(self, stream: OutputStream) -> None:
        for request in self._of_stream(stream):
            request.paused = False
        self._pump_soon()
