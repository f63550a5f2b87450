"""The configuration: its shape, its defaults and its limits.

It does not know where values come from; cli/settings.py merges defaults < YAML < MLXD_* environment < flags.
Every struct forbids unknown fields. Units are in the names; 0 means "no limit" only where it is said.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Fraction = Annotated[float, Meta(gt=0, le=1)]
PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]


def model_id(path: str) -> str:
    """What a model is called by whoever gives it no name: as on the hub, or the last part of a path on this
    machine. Answers say it to everyone, and where a server keeps its files is nobody's business."""
    is_local = path.startswith(("/", "~", "./", "../")) or path.endswith(".gguf") or path.count("/") > 1
    return (is_local and PurePath(path).name) or path


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A section of the YAML file."""


class ModelConfig(_Section, frozen=True):
    """Which model, under which names."""

    path: str | None = None
    """a Hugging Face id, a local folder, a .gguf file of a llama-family model, or demo:smollm2"""
    revision: str | None = None
    """branch, tag or commit on the hub; null: the main branch"""
    served_names: tuple[str, ...] = ()
    """names beside the id and `default`; the first one is what responses carry"""
    owned_by: str = "vllm-mlx"
    """`owned_by` of /v1/models, by which Olla and others recognise the backend"""
    max_model_len: PositiveInt | None = None
    """tokens of prompt and answer together; null: the model's own limit. Lowered to what the cache holds"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: the checkpoint's own on GPUs; float32, dequantised, on CPUs"""
    chat_template: str | None = None
    """a file that replaces the model's own template"""
    trust_remote_code: bool = False
    """run Python code that comes with the model; only for models you trust"""

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is served as; responses carry the first."""
        return self.served_names or ((model_id(self.path),) if self.path else ())


class ServerConfig(_Section, frozen=True):
    """Sockets and HTTP limits."""

    host: str = "0.0.0.0"
    """address to listen on; 0.0.0.0 is every IPv4 address"""
    port: Port = 8000
    """0 takes a free one, which the log names"""
    unix_socket: str | None = None
    """a path; takes the place of host and port"""
    unix_socket_access: Literal["owner", "group", "all"] = "owner"
    """which users of the machine may connect to it: mlxd's own, those in its group, or all"""
    backlog: PositiveInt = 2048
    """connections that the kernel holds until they are accepted"""
    header_timeout_seconds: Seconds = 20.0
    """how long a client may take to send a request's headers"""
    body_timeout_seconds: Seconds = 60.0
    """the same for its body"""
    keep_alive_seconds: Seconds = 75.0
    """how long an idle connection is kept for the next request"""
    write_timeout_seconds: Seconds = 60.0
    """a client that takes no byte for this long is cut off"""
    shutdown_seconds: Annotated[float, Meta(ge=0)] = 30.0
    """how long running requests may go on after SIGTERM"""
    max_connections: PositiveInt = 4096
    """more get a 503"""
    max_request_line_bytes: PositiveInt = 8192
    """more is a 414"""
    max_header_count: PositiveInt = 100
    """more is a 431"""
    max_header_bytes: PositiveInt = 65536
    """of all headers together; more is a 431"""
    max_body_bytes: PositiveInt = 8388608
    """more is a 413; a million token ids are 6 to 8 MB"""
    max_json_depth: PositiveInt = 64
    """of nesting; more is a 400"""
    write_buffer_bytes: PositiveInt = 65536
    """unsent bytes of one connection above which its stream pauses"""
    max_pipelined_requests: PositiveInt = 16
    """read ahead on one connection before reading pauses"""
    cors_origins: tuple[str, ...] = ()
    """`*` for any"""
    trusted_proxies: tuple[str, ...] = ()
    """addresses, networks (CIDR) or `unix`, whose X-Forwarded-For is believed"""
    metrics: bool = False
    """Prometheus metrics on /metrics, which asks for no key"""
    web_page: bool = True
    """a page at `/` to chat with the model and watch the server; asks for a key where there are some"""
    access_log: bool = True
    """one line a request"""


class ApiKeyConfig(_Section, frozen=True):
    """One API key and what its holder may do. Exactly one of key, key_file and key_env is set."""

    name: str = "default"
    """in logs and metrics"""
    key: str | None = None
    """the key itself"""
    key_file: str | None = None
    """a file that holds it"""
    key_env: str | None = None
    """a variable of the environment that holds it"""
    rate_limit: NonNegativeInt | None = None
    """requests a minute; 0 = unlimited, None: limits.rate_limit"""
    token_rate_limit: NonNegativeInt | None = None
    """tokens a minute; 0 = unlimited, None: limits.token_rate_limit"""
    token_quota: PositiveInt | None = None
    """tokens a day (UTC), as long as the process lives"""
    priority: int = 0
    """of its requests; lower runs first. A request's own `priority` is added to it"""
    weight: Annotated[float, Meta(gt=0)] = 1.0
    """its share beside other clients of the same priority"""
    cache_salt: str = ""
    """keys with different salts share no cached prefixes, so none can time what another has asked"""
    admin: bool = False
    """may clear the cache and see the pins of all; a sole key always may"""


class LimitsConfig(_Section, frozen=True):
    """Who may ask, and how much."""

    api_keys: tuple[ApiKeyConfig, ...] = ()
    """who may ask; none: everyone"""
    isolate_keys: bool = False
    """every key without a cache_salt gets its name as one: no key can time what another has asked"""
    rate_limit: NonNegativeInt = 0
    """requests a minute for each key or, without keys, address; 0 = unlimited"""
    token_rate_limit: NonNegativeInt = 0
    """the same for tokens, prompt and generated ones; 0 = unlimited"""
    max_tracked_clients: PositiveInt = 10000
    """addresses whose limits are remembered"""
    timeout_seconds: Seconds = 300.0
    """of a request, from its arrival to its last token"""
    max_choices: PositiveInt = 128
    """the largest `n` and `best_of`"""
    max_stop_strings: PositiveInt = 16
    """of one request"""
    max_prompts: PositiveInt = 1024
    """of one request"""
    max_prompt_logprobs: PositiveInt = 1000000
    """log-probabilities of prompt tokens in an answer, alternatives among them"""


class DefaultsConfig(_Section, frozen=True):
    """What a request gets where it says nothing. None: the model's generation_config, else 1.0."""

    max_tokens: PositiveInt = 32768
    """to generate; cut to what the context leaves"""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """0 is greedy"""
    top_p: Fraction | None = None
    """the nucleus"""
    stream_interval: PositiveInt = 1
    """tokens a stream chunk"""


class SchedulerConfig(_Section, frozen=True):
    """How steps are filled."""

    continuous_batching: bool = True
    """false: one request at a time"""
    max_num_seqs: PositiveInt = 256
    """sequences that run at once, fewer where the states of recurrent models have no room; others wait"""
    max_num_batched_tokens: PositiveInt = 2048
    """tokens of one step, prompts and answers together"""
    max_step_ms: Seconds = 200.0
    """prefill chunks are cut so that a step with decode rows stays near this"""
    max_queue: PositiveInt = 1024
    """waiting requests above which new ones are refused"""
    max_queue_tokens: PositiveInt = 4194304
    """prompt tokens of waiting requests above which new ones are refused"""


class CacheConfig(_Section, frozen=True):
    """The KV cache."""

    paged: bool = True
    """false: mlx-lm's contiguous caches"""
    block_size: Annotated[int, Meta(ge=1, le=256)] = 16
    """tokens of a block"""
    memory_mb: PositiveInt | None = None
    """MiB of KV, and of recurrent models' states"""
    memory_percent: Fraction = 0.20
    """of the device's memory; memory_mb wins"""
    num_blocks: Annotated[int, Meta(ge=2)] | None = None
    """exact pool size, for tests and benches; wins over both"""
    prefix_caching: bool = True
    """reuse what was computed for others that begin with the same tokens"""
    snapshot_percent: Annotated[float, Meta(ge=0, le=0.5)] = 0.25
    """of the cache, for states of recurrent models where prefixes end; 0: they share no prefixes"""
    prefill_answers: bool = True
    """where templates show earlier answers otherwise than they were given (without thinking), compute each as
    the next turn's prompt will have it, while nothing else waits"""
    explain_misses: bool = True
    """keep, for the last few hundred requests, some text around the place where they parted from the cache"""
    warm_prompts: str | None = None
    """a JSONL file of prompts that are computed when the worker is ready"""
    pin_quota_mb: NonNegativeInt = 256
    """how much of the cache each key (or address) may pin; 0: nothing"""
    max_pinned_percent: Annotated[float, Meta(ge=0, le=0.9)] = 0.5
    """of the pool, by all together"""
    disk_path: str | None = None
    """a folder where computed blocks are kept too, and found again after a restart; None: no such tier"""
    disk_max_gb: Annotated[float, Meta(gt=0)] = 20.0
    """10^9 bytes that the files below disk_path may take"""


class WorkerConfig(_Section, frozen=True):
    """The process that owns MLX."""

    backend: Literal["mlx", "playback"] = "mlx"
    """playback: no model; emits given text (tests, benches of the front)"""
    playback_tokens_per_second: Annotated[float, Meta(ge=0)] = 0.0
    """for each request; 0 = at once"""
    heartbeat_timeout_seconds: Seconds = 30.0
    """no beat for this long, or one step this long, and /health says 503"""
    step_timeout_seconds: Seconds = 300.0
    """one step this long, and the worker is killed and started anew"""
    max_restarts: NonNegativeInt = 5
    """in ten minutes; then the server exits with 1"""
    threads: NonNegativeInt = 0
    """BLAS threads on CPUs; 0 = one a core"""
    warmup: bool = True
    """compile and run everything once before /health/ready says yes"""


class ChatConfig(_Section, frozen=True):
    """How a model's text becomes messages. None: what the model's own template and type suggest."""

    enable_auto_tool_choice: bool = False
    """calls are read whenever a request has tools; true insists on it: then the parser cannot be none"""
    tool_call_parser: str | None = None
    """a name of chat/tool_parsers, auto (the model's; else by the first marker in the text) or none"""
    reasoning_parser: str | None = None
    """a name of chat/reasoning, auto (the model's; else by the answer's first tag) or none"""


class EmbeddingsConfig(_Section, frozen=True):
    """The model behind /v1/embeddings and /v1/rerank, in a worker of its own."""

    model: str | None = None
    """a Hugging Face id, a local folder, or demo:minilm"""
    revision: str | None = None
    """branch, tag or commit on the hub; null: the main branch"""
    served_names: tuple[str, ...] = ()
    """names beside the id and `default`; the first one is what responses carry"""
    max_model_len: PositiveInt | None = None
    """tokens of an input; None: what the model's own files say"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: half precision on GPUs, float32 on CPUs"""
    truncate: bool = True
    """cut inputs that are too long; false: refuse them"""
    max_inputs: PositiveInt = 2048
    """of one request"""
    max_batch_tokens: PositiveInt = 2048
    """of one forward, padding included"""
    max_queue: PositiveInt = 16384
    """waiting inputs above which new ones are refused"""
    threads: NonNegativeInt = 1
    """BLAS threads on CPUs; 0 = one a core"""
    nice: Annotated[int, Meta(ge=0, le=19)] = 10
    """how far the process steps back for others, as in nice(1)"""

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is served as; responses carry the first."""
        return self.served_names or ((model_id(self.model),) if self.model else ())


class McpConfig(_Section, frozen=True):
    """Tools from MCP servers."""

    config: str | None = None
    """a JSON or YAML file with `mcpServers`; only what it names is ever run or reached"""
    default_servers: tuple[str, ...] = ()
    """servers whose tools every chat is offered; others are on request"""
    max_turns: Annotated[int, Meta(ge=1, le=100)] = 8
    """answers of the model within one chat request, tools being run in between"""
    max_concurrent_calls: PositiveInt = 16
    """of tools, over all requests; more wait"""
    timeout_seconds: Seconds = 60.0
    """of one tool call, where its server's entry has no `timeout`"""
    max_result_bytes: PositiveInt = 262_144
    """of one tool's result; a larger one becomes an error that the model is told"""


class LogConfig(_Section, frozen=True):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """lines below it are left out"""
    format: Literal["text", "json"] = "text"
    """text for people, json for machines; both to standard error"""


class Config(_Section, frozen=True):
    """The whole of server.yaml."""

    model: ModelConfig = ModelConfig()
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    defaults: DefaultsConfig = DefaultsConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    chat: ChatConfig = ChatConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    mcp: McpConfig = McpConfig()
    worker: WorkerConfig = WorkerConfig()
    log: LogConfig = LogConfig()
