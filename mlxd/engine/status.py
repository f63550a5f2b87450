"""The engine's state in the words of the server guide's /v1/status, and some more of ours.

It does not know HTTP. Sizes ending in _gb are 10^9 bytes, times are seconds.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mlxd.engine.disk_tier import DiskTier
from mlxd.engine.prefix_report import HitType, PrefixReport
from mlxd.engine.request import FinishReason, Request, RequestStatus
from mlxd.engine.supervisor import WorkerState

if TYPE_CHECKING:
    from mlxd.engine.engine import Engine

GB = 1e9
MB = 1e6
REQUESTS_AT_ONCE = 32
"""Described before others have their turn; each may take 40 us, because a few texts of it are detokenised."""


async def describe(engine: Engine) -> dict[str, object]:
    """All of /v1/status as JSON-ready builtins; requests one after another, as they are at that moment."""
    requests: list[dict[str, object]] = []
    for place, request in enumerate(engine.requests(), 1):
        if not request.status.is_finished:  # it may have ended since
            requests.append(_request(engine, request, engine.now()))
        if place % REQUESTS_AT_ONCE == 0:
            await asyncio.sleep(0)
    engine.check_integrity()
    stats, info, scheduler, supervisor = engine.stats, engine.info, engine.scheduler, engine.supervisor
    return {
        "status": _state(engine),
        "model": next(iter(engine.config.model.names), None),
        "uptime_s": round(engine.uptime_seconds, 3),
        "steps_executed": stats.num_steps,
        "num_running": scheduler.num_running if scheduler else 0,
        "num_waiting": len(scheduler.waiting) if scheduler else 0,
        "total_requests_processed": stats.num_requests,
        "total_prompt_tokens": stats.num_prompt_tokens,
        "total_completion_tokens": stats.num_output_tokens,
        "metal": {
            "active_memory_gb": round(stats.active_memory_bytes / GB, 3),
            "peak_memory_gb": round(stats.peak_memory_bytes / GB, 3),
            "cache_memory_gb": round(stats.cache_memory_bytes / GB, 3),
        },
        "cache": describe_cache(engine),
        "requests": requests,
        "finish_reasons": dict(stats.finish_reasons),
        "num_preempted": engine.num_preemptions,
        "worker": {
            "state": str(supervisor.state),
            "pid": info.pid if info else None,
            "restarts": supervisor.num_restarts,
            "resumed_requests": stats.num_resumed,
            "heartbeat_age_s": round(supervisor.heartbeat_age_seconds, 3),
            "device": info.device if info else None,
            "attention": info.attention if info else None,
            "dtype": info.dtype if info else None,
            "versions": info.versions if info else {},
            "warnings": list(info.warnings) if info else [],
        },
        "loop_lag": {
            "p50_ms": round(engine.loop_monitor.percentile(0.5) * 1e3, 3),
            "p99_ms": round(engine.loop_monitor.percentile(0.99) * 1e3, 3),
            "max_ms": round(engine.loop_monitor.percentile(1.0) * 1e3, 3),
        },
        "integrity_errors": stats.num_integrity_errors,
    }


def _state(engine: Engine) -> str:
    match engine.supervisor.state:
        case WorkerState.READY:
            return "running"
        case WorkerState.STOPPED | WorkerState.FAILED:
            return "stopped"
        case _:
            return "not_loaded"


def describe_cache(engine: Engine) -> dict[str, object]:
    """The cache's part of /v1/status: `entries` are cached blocks, `memory_mb` is what they and others take.

    `used_blocks` are held by running requests or pins, `evictable_blocks` are cached and held by nobody.
    """
    info, scheduler, stats = engine.info, engine.scheduler, engine.stats
    kind = "paged_cache" if engine.config.cache.paged else "contiguous_cache"
    if info is None or scheduler is None:
        return {"type": kind, "entries": 0, "hit_rate": 0.0, "memory_mb": 0.0}
    kv = scheduler.kv
    block_bytes = info.memory.kv_bytes_per_token * info.block_size
    total = stats.num_prompt_tokens
    status: dict[str, object] = {
        "type": kind,
        "entries": kv.num_cached_blocks,
        "hit_rate": round(stats.num_cached_tokens / total, 4) if total else 0.0,
        "memory_mb": round((kv.num_total_blocks - kv.pool.num_free) * block_bytes / MB, 1),
        "prefix_caching": kv.prefix_caching,
        "block_size": info.block_size,
        "total_blocks": kv.num_total_blocks,
        "used_blocks": kv.num_used_blocks,
        "evictable_blocks": kv.index.num_evictable,
        "free_blocks": kv.pool.num_free,
        "evicted_blocks": stats.num_evicted_blocks + kv.num_evicted_blocks,
        "capacity_mb": round(info.memory.kv_pool_bytes / MB, 1),
        "pins": len(engine.pins),
        "pinned_blocks": kv.num_held_blocks,
        "prompt_tokens": total,
        "cached_tokens": stats.num_cached_tokens,
        "background_prefills": stats.num_background,
        "background_prefills_dropped": stats.num_background_dropped,
        "background_tokens": stats.num_background_tokens,
        "hit_types": {hit_type.value: stats.prefix_hits[hit_type.value] for hit_type in HitType},
    }
    if info.memory.state_bytes:
        status["state_capacity_mb"] = round(info.memory.state_bytes / MB, 1)
    if kv.states is not None:
        status["snapshots"] = kv.states.num_kept
        status["max_snapshots"] = kv.states.num_snapshots
        status["snapshot_capacity_mb"] = round(info.memory.snapshot_bytes / MB, 1)
    if scheduler.disk is not None:
        status["disk"] = _disk(scheduler.disk)
    return status


def _disk(disk: DiskTier) -> dict[str, object]:
    stats = disk.stats
    return {
        "blocks": disk.index.num_stored,
        "max_blocks": disk.info.max_blocks,
        "size_mb": round(disk.index.num_stored * disk.info.block_bytes / MB, 1),
        "complete": disk.is_complete,
        "storing_blocks": disk.num_storing,
        "restoring_requests": disk.num_restoring,
        "stored_blocks": stats.num_stored_blocks,
        "skipped_blocks": stats.num_skipped_blocks,
        "evicted_blocks": stats.num_evicted_blocks,
        "restores": stats.num_restores,
        "restored_tokens": stats.num_restored_tokens,
        "errors": dict(stats.errors),
    }


def describe_sequences(engine: Engine, request_id: str, client: str | None) -> list[dict[str, object]]:
    """Each sequence of a request, ended ones first, with the texts around the place where its prompt parted
    from the cache."""
    now = engine.now()
    found = [(ended.figures, ended.prefix) for ended in engine.ended.find(request_id, client)]
    found += [(_figures(request, now), request.prefix_report) for request in engine.find(request_id, client)]
    return [figures | _prefix(engine, report, with_text=True) for figures, report in found]


def ended_figures(request: Request, reason: FinishReason, now: float) -> dict[str, object]:
    """What is kept of a request that ends `now`."""
    figures = _figures(request, now)
    del figures["computed_tokens"]  # its blocks are others' already
    return figures | {"phase": "finished", "finish_reason": reason.value}


def _prefix(engine: Engine, report: PrefixReport | None, *, with_text: bool) -> dict[str, object]:
    if report is None:
        # Not admitted yet. The guide has a word for every request.
        return {"cache_hit_type": HitType.MISS.value, "cached_tokens": 0, "cache_miss": None}
    # With several keys, what the cache had instead may be from another one's prompt: asking again and again,
    # one could read that to its end.
    shows_cached = len(engine.config.limits.api_keys) <= 1
    tokenizer = engine.tokenizer
    decode = tokenizer.decode if tokenizer is not None and with_text else None
    return report.to_json(decode, shows_cached=shows_cached)


def _request(engine: Engine, request: Request, now: float) -> dict[str, object]:
    # Whoever may see the status sees every request: with several keys, the prompts are not all theirs.
    with_text = len(engine.config.limits.api_keys) <= 1
    figures = _figures(request, now) | {"background": request.params.background}
    return figures | _prefix(engine, request.prefix_report, with_text=with_text)


def _figures(request: Request, now: float) -> dict[str, object]:
    num_output_tokens = len(request.output_token_ids)
    first = request.first_token_time
    scheduled = request.first_scheduled_time
    generating = now - first if first is not None else 0.0
    if request.status is not RequestStatus.RUNNING:
        phase = "queued"
    else:
        phase = "generation" if request.decoding and first is not None else "prefill"
    return {
        "request_id": request.request_id,
        "phase": phase,
        "tokens_per_second": round((num_output_tokens - 1) / generating, 2) if generating > 0 else 0.0,
        "ttft_s": round(first - request.arrival_time, 4) if first is not None else None,
        "progress": round(num_output_tokens / max(1, request.max_tokens), 4),
        "generated_tokens": num_output_tokens,
        "max_tokens": request.max_tokens,
        "prompt_tokens": request.num_prompt_tokens,
        "computed_tokens": request.num_computed_tokens,
        "queue_s": round((scheduled if scheduled is not None else now) - request.arrival_time, 4),
        "elapsed_s": round(now - request.arrival_time, 4),
        "completion_tokens": num_output_tokens,
        "preemptions": request.num_preemptions,
    }
