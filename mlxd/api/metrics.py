"""GET /metrics: everything that is counted, as Prometheus reads it.

It does not count anything itself: it reads the engine's and the API's books when somebody scrapes, so that
what is not scraped costs nothing. Importing it imports prometheus_client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from mlxd import __version__
from mlxd.api.traffic import Traffic
from mlxd.engine.engine import Engine
from mlxd.engine.prefix_report import HitType
from mlxd.engine.supervisor import WorkerState
from mlxd.metrics import Histogram

if TYPE_CHECKING:
    from mlxd.engine.embedding_engine import EmbeddingEngine

PREFIX = "mlxd_"


class MetricsPage:
    """One for a server that has metrics enabled."""

    content_type = b"text/plain; version=0.0.4; charset=utf-8"

    def __init__(
        self, engine: Engine, traffic: Traffic, embedding_engine: EmbeddingEngine | None = None
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(TrafficCollector(traffic))
        self._registry.register(EngineCollector(engine))
        if embedding_engine is not None:
            self._registry.register(EmbeddingCollector(embedding_engine))

    def render(self) -> bytes:
        """The page. OpenMetrics would hold up the event loop for nearly twice as long."""
        return generate_latest(self._registry)


class TrafficCollector(Collector):
    """HTTP requests, as api/traffic.py counts them."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def collect(self) -> Iterable[Metric]:
        traffic = self._traffic
        yield _counter(
            "requests",
            "HTTP requests answered. finish_reason is that of the sequence which ended worst.",
            ("endpoint", "status", "finish_reason"),
            traffic.requests.items(),
        )
        # The scrape is one itself.
        yield _gauge("requests_in_flight", "HTTP requests being answered.", traffic.num_in_flight - 1)
        yield _counter(
            "aborts",
            "Generations that ended before they were done.",
            ("reason",),
            _one_label(traffic.aborts),
        )
        yield _counter(
            "rate_limited",
            "Requests refused with 429, by the limit that they reached.",
            ("limit",),
            _one_label(traffic.rate_limited),
        )
        yield _counter(
            "key_tokens",
            "Tokens of each API key; kind is prompt or completion.",
            ("key", "kind"),
            traffic.key_tokens.items(),
        )


class EngineCollector(Collector):
    """Sequences, steps, cache and worker. Sequences are what the engine runs: n choices are n of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        yield from self._sequences()
        yield from self._steps()
        yield from self._cache()
        if self._engine.config.cache.disk_path is not None:
            yield from self._disk()
        yield from self._worker()
        lag = self._engine.loop_monitor.histogram
        yield _histogram("event_loop_lag_seconds", "How late the front's event loop ran its timers.", lag)

    def _sequences(self) -> Iterator[Metric]:
        stats, scheduler = self._engine.stats, self._engine.scheduler
        num_running = scheduler.num_running if scheduler else 0
        num_waiting = len(scheduler.waiting) if scheduler else 0
        waiting_tokens = scheduler.waiting.num_tokens if scheduler else 0
        yield _gauge("sequences_running", "Sequences that have KV blocks.", num_running)
        yield _gauge("sequences_waiting", "Sequences in the queue.", num_waiting)
        yield _gauge("waiting_tokens", "Prompt tokens in the queue.", waiting_tokens)
        yield _counter(
            "sequences",
            "Sequences that ended.",
            ("finish_reason",),
            _one_label(stats.finish_reasons),
        )
        yield _total(
            "preemptions",
            "Sequences that lost their KV blocks for want of memory.",
            self._engine.num_preemptions,
        )
        yield _total(
            "resumed_sequences", "Sequences that went on after their worker's death.", stats.num_resumed
        )
        yield _total("prompt_tokens", "Prompt tokens taken.", stats.num_prompt_tokens)
        yield _total("generation_tokens", "Tokens generated.", stats.num_output_tokens)
        for name, help_text, histogram in (
            ("queue_seconds", "From arrival to the first step.", stats.queue_seconds),
            ("prefill_seconds", "From the first step to the first token.", stats.prefill_seconds),
            ("time_to_first_token_seconds", "From arrival to the first token.", stats.ttft_seconds),
            ("inter_token_latency_seconds", "From a token to the next, each gap.", stats.itl_seconds),
            ("time_per_output_token_seconds", "Each sequence's mean gap.", stats.tpot_seconds),
            ("e2e_latency_seconds", "From arrival to the end.", stats.e2e_seconds),
            ("sequence_prompt_tokens", "Prompt tokens of a sequence.", stats.prompt_tokens),
            ("sequence_generation_tokens", "Generated tokens of a sequence.", stats.output_tokens),
        ):
            yield _histogram(name, help_text, histogram)

    def _steps(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield _histogram("step_seconds", "How long steps take in the worker.", stats.step_seconds)
        yield _histogram("step_tokens", "Tokens computed in a step.", stats.step_tokens)
        yield _histogram("step_batch_size", "Sequences in a step.", stats.step_rows)

    def _cache(self) -> Iterator[Metric]:
        engine = self._engine
        stats, scheduler, info = engine.stats, engine.scheduler, engine.info
        used = scheduler.kv.num_used_blocks if scheduler else 0
        total = scheduler.kv.num_total_blocks if scheduler else 0
        yield _gauge("kv_cache_usage_ratio", "Share of the KV blocks in use.", used / total if total else 0.0)
        yield _gauge("kv_cache_blocks", "KV blocks that can be used.", total)
        yield _total(
            "prefix_cache_query_tokens", "Prompt tokens looked up in the cache.", stats.num_prompt_tokens
        )
        yield _total("prefix_cache_hit_tokens", "Prompt tokens found there.", stats.num_cached_tokens)
        num_evicted = stats.num_evicted_blocks + (scheduler.kv.num_evicted_blocks if scheduler else 0)
        yield _total(
            "prefix_cache_evicted_tokens",
            "Tokens that blocks given up for others had room for.",
            num_evicted * (info.block_size if info else 0),
        )
        yield _counter(
            "prefix_cache_requests",
            "Sequences by how their prompt met the cache.",
            ("hit_type",),
            _one_label({kind.value: stats.prefix_hits[kind.value] for kind in HitType}),
        )
        yield _counter(
            "background_prefills",
            "Prompts computed ahead of the request that will have them, or dropped for others.",
            ("outcome",),
            _one_label({"done": stats.num_background, "dropped": stats.num_background_dropped}),
        )
        yield _total(
            "background_tokens", "Tokens of these; no other total has them.", stats.num_background_tokens
        )
        yield _gauge(
            "prefix_cache_blocks",
            "KV blocks whose tokens others can reuse.",
            scheduler.kv.num_cached_blocks if scheduler else 0,
        )
        yield _gauge(
            "prefix_cache_evictable_blocks",
            "Of these, the ones that no running sequence uses.",
            scheduler.kv.index.num_evictable if scheduler else 0,
        )
        states = scheduler.kv.states if scheduler else None
        yield _gauge(
            "prefix_cache_states",
            "States of recurrent layers kept for prefixes; 0 also for models without.",
            states.num_kept if states is not None else 0,
        )

    def _disk(self) -> Iterator[Metric]:
        stats, scheduler = self._engine.stats.disk, self._engine.scheduler
        disk = scheduler.disk if scheduler is not None else None
        num_blocks = disk.index.num_stored if disk is not None else 0
        block_bytes = disk.info.block_bytes if disk is not None else 0
        yield _gauge("disk_cache_blocks", "KV blocks on disk; 0 also while there is no tier.", num_blocks)
        yield _gauge("disk_cache_bytes", "What they take there.", num_blocks * block_bytes)
        yield _total("disk_cache_stored_blocks", "Blocks written.", stats.num_stored_blocks)
        yield _total("disk_cache_skipped_blocks", "Blocks lost before they were.", stats.num_skipped_blocks)
        yield _total("disk_cache_evicted_blocks", "Blocks deleted for others.", stats.num_evicted_blocks)
        yield _total("disk_cache_hit_tokens", "Tokens whose KV was read back.", stats.num_restored_tokens)
        yield _counter(
            "disk_cache_errors",
            "Blocks that could not be read or written, by the reason.",
            ("kind",),
            _one_label(stats.errors),
        )

    def _worker(self) -> Iterator[Metric]:
        engine = self._engine
        supervisor, stats, info = engine.supervisor, engine.stats, engine.info
        yield _gauge("worker_up", "1 while the worker takes steps.", supervisor.state is WorkerState.READY)
        yield _total("worker_restarts", "Workers started after one was lost.", supervisor.num_restarts)
        yield _gauge(
            "worker_heartbeat_age_seconds",
            "Time since the worker's last sign of life.",
            supervisor.heartbeat_age_seconds,
        )
        memory = GaugeMetricFamily(
            PREFIX + "device_memory_bytes", "The allocator's memory on the device.", labels=("kind",)
        )
        for kind, value in (
            ("active", stats.active_memory_bytes),
            ("peak", stats.peak_memory_bytes),
            ("cache", stats.cache_memory_bytes),
        ):
            memory.add_metric((kind,), value)
        yield memory
        build = GaugeMetricFamily(
            PREFIX + "info",
            "Always 1; the labels say what serves.",
            labels=("version", "model_type", "device", "dtype"),
        )
        facts = (info.model_type, info.device, info.dtype) if info else ("", "", "")
        build.add_metric((__version__, *facts), 1)
        yield build


class EmbeddingCollector(Collector):
    """The embedding model's requests, batches and worker; only where there is one."""

    def __init__(self, engine: EmbeddingEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine, stats, supervisor = self._engine, self._engine.stats, self._engine.supervisor
        yield _gauge("embedding_inputs_running", "Inputs that the embedding worker has.", engine.num_running)
        yield _gauge("embedding_inputs_waiting", "Inputs in the embedding queue.", engine.num_waiting)
        yield _total("embedding_inputs", "Inputs computed.", stats.num_inputs)
        yield _total("embedding_tokens", "Tokens of these, without padding.", stats.num_tokens)
        for name, help_text, histogram in (
            ("embedding_request_seconds", "From arrival to the last vector.", stats.request_seconds),
            ("embedding_batch_seconds", "How long batches take in the worker.", stats.batch_seconds),
            ("embedding_batch_inputs", "Inputs in a batch.", stats.batch_inputs),
            ("embedding_batch_tokens", "Tokens in a batch, without padding.", stats.batch_tokens),
        ):
            yield _histogram(name, help_text, histogram)
        is_up = supervisor.state is WorkerState.READY
        yield _gauge("embedding_worker_up", "1 while the embedding worker takes batches.", is_up)
        yield _total(
            "embedding_worker_restarts", "Workers started after one was lost.", supervisor.num_restarts
        )
        yield _gauge(
            "embedding_device_memory_bytes",
            "The embedding worker's memory on the device.",
            stats.active_memory_bytes,
        )


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, help_text, value=value)


def _total(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, help_text, value=value)


def _counter(
    name: str, help_text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], int]]
) -> Metric:
    family = CounterMetricFamily(PREFIX + name, help_text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _one_label(values: Mapping[str, int]) -> Iterator[tuple[tuple[str, ...], int]]:
    return (((label,), value) for label, value in values.items())


def _histogram(name: str, help_text: str, histogram: Histogram) -> Metric:
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, histogram.cumulative(), strict=True))
    return HistogramMetricFamily(PREFIX + name, help_text, buckets=buckets, sum_value=histogram.total)
