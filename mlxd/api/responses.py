"""What the endpoints of no dialect answer, for the API's description. The handlers write plain dictionaries.

It does not know requests. Tests hold real answers against these, which may have more fields than are named.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Health(msgspec.Struct, kw_only=True):
    status: Literal["healthy", "unhealthy", "not_ready"]
    model: str | None = None
    reason: str | None = None


class CancelledRequest(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["request"]
    cancelled: bool


class Tokens(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DecodedPrompt(msgspec.Struct, kw_only=True):
    prompt: str


class RankedText(msgspec.Struct, kw_only=True):
    text: str


class RankedDocument(msgspec.Struct, kw_only=True):
    index: int
    relevance_score: float
    document: RankedText | None = None


class RerankUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class Ranking(msgspec.Struct, kw_only=True):
    """`results`: the most relevant first."""

    id: str
    model: str
    usage: RerankUsage
    results: list[RankedDocument]


class DeviceMemory(msgspec.Struct, kw_only=True):
    active_memory_gb: float
    peak_memory_gb: float
    cache_memory_gb: float


class CacheStatus(msgspec.Struct, kw_only=True):
    type: str
    entries: int
    hit_rate: float
    memory_mb: float


class CacheToken(msgspec.Struct, kw_only=True):
    id: int
    text: str


class CacheMiss(msgspec.Struct, kw_only=True):
    """Why no more of a prompt was found in the cache: the first token that was not, and what surrounds it."""

    cause: str
    position: int
    message: int | None
    token: CacheToken | None = None
    text_before: str | None = None
    text: str | None = None
    cached_token: CacheToken | None = None
    cached_text: str | None = None


class RequestStatus(msgspec.Struct, kw_only=True):
    """`background`: nobody waits for it; it is computed ahead of the requests that will have its prompt."""

    request_id: str
    phase: Literal["queued", "prefill", "generation", "finished"]
    tokens_per_second: float
    ttft_s: float | None
    progress: float
    cache_hit_type: Literal["exact", "prefix", "supersequence", "lcp", "miss"]
    cached_tokens: int
    cache_miss: CacheMiss | None
    generated_tokens: int
    max_tokens: int
    prompt_tokens: int
    queue_s: float
    elapsed_s: float
    background: bool = False
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None


class RequestDetails(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["request"]
    sequences: list[RequestStatus]


class ServerStatus(msgspec.Struct, kw_only=True):
    status: Literal["running", "stopped", "not_loaded"]
    model: str | None
    uptime_s: float
    steps_executed: int
    num_running: int
    num_waiting: int
    total_requests_processed: int
    total_prompt_tokens: int
    total_completion_tokens: int
    metal: DeviceMemory
    cache: CacheStatus
    requests: list[RequestStatus]
    worker: dict[str, Any]


class ClearedCache(msgspec.Struct, kw_only=True):
    object: Literal["cache"]
    cleared_blocks: int


class Pin(msgspec.Struct, kw_only=True):
    """`pinned_tokens` are 0 while a new worker computes them again."""

    id: str
    object: Literal["cache.pin"]
    prompt_tokens: int
    pinned_tokens: int
    pinned_blocks: int
    expires_in_s: float


class PinList(msgspec.Struct, kw_only=True):
    object: Literal["list"]
    data: list[Pin]


class DeletedPin(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["cache.pin"]
    deleted: bool


class McpTool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: dict[str, Any]
    name: str
    description: str
    parameters: dict[str, Any]
    server: str


class McpTools(msgspec.Struct, kw_only=True):
    tools: list[McpTool]
    count: int


class McpServer(msgspec.Struct, kw_only=True):
    name: str
    state: Literal["connecting", "connected", "disconnected"]
    transport: Literal["stdio", "sse", "http"]
    tools_count: int
    error: str | None
    restarts: int


class McpServers(msgspec.Struct, kw_only=True):
    servers: list[McpServer]


class McpResult(msgspec.Struct, kw_only=True):
    """`result` are MCP's content blocks, `content` their text."""

    tool_name: str
    server: str
    tool: str
    content: str
    result: list[dict[str, Any]]
    structured_content: Any
    is_error: bool
    error_message: str | None
