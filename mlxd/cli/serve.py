"""`mlxd serve` and `mlxd demo`: wires engine, app and server together, and tells the operator how it goes.

It does not know HTTP, requests or models; it only introduces the parts to one another.
"""

from __future__ import annotations

import gc
import ipaddress
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import TextIO

from mlxd import log
from mlxd.cli import EXIT_FAILURE, EXIT_USAGE
from mlxd.cli.progress import LogProgress, ProgressView, progress_view
from mlxd.cli.settings import resolve_secrets
from mlxd.config import Config
from mlxd.errors import ConfigError, MlxdError
from mlxd.step import EmbedderReady, MemoryPlan, WorkerReady

logger = logging.getLogger(__name__)

COLLECT_AFTER_OBJECTS = 5_000
"""New objects after which the collector looks at them, which takes 1 to 2 ms while all are in use. A request
is some 100 objects as long as it runs, and once it is answered it leaves none to the collector: with Python's
own 700, hundreds of requests would be looked at again and again for nothing."""
EXAMPLE_QUESTION = "What is the capital of France? Answer in one sentence."


def run_serve(config: Config, *, show_example: bool) -> int:
    """Serves until a signal. Returns the exit code. `show_example`: print a curl line when ready.

    Raises ConfigError for API keys that cannot be read.
    """
    config = resolve_secrets(config, os.environ)
    secrets = [entry.key for entry in config.limits.api_keys if entry.key]
    log.setup(config.log.level, config.log.format, secrets=secrets)
    if is_exposed(config):
        logger.warning(
            "%s is open to the network and no API key is set: anyone who reaches port %d can use the model "
            "(--api-key, or --host 127.0.0.1)",
            config.server.host,
            config.server.port,
        )

    from mlxd.api.app import create_app
    from mlxd.api.threads import switch_often
    from mlxd.engine.engine import Engine
    from mlxd.server import serve

    switch_often()
    view = progress_view(sys.stderr, time.monotonic)
    announcer = Announcer(config, view, sys.stdout, show_example=show_example)
    engine = Engine(config, on_progress=view.update, on_ready=announcer.ready, on_failed=announcer.failed)
    embedding_engine = None
    if config.embeddings.model is not None:
        from mlxd.engine.embedding_engine import EmbeddingEngine

        embedding_engine = EmbeddingEngine(
            config,
            on_progress=LogProgress(time.monotonic, "embedding model:").update,
            on_ready=announcer.embedder_ready,
            on_failed=announcer.embedder_failed,
        )
    app = create_app(config, engine, embedding_engine)
    try:
        code = serve(
            app,
            config.server,
            describe_error=app.describe_error,
            on_listening=announcer.listening,
            on_shutdown_deadline=app.end_streams,
            access_log=logging.getLogger(log.ACCESS_LOGGER) if config.server.access_log else None,
        )
    except OSError as error:
        where = config.server.unix_socket or f"{config.server.host}:{config.server.port}"
        logger.error("cannot listen on %s: %s", where, error.strerror or error)
        return EXIT_FAILURE
    finally:
        view.close()
    return announcer.exit_code or code


class Announcer:
    """Says where the server listens; when the model is loaded, what it holds; when it cannot be, why.

    `exit_code` is 0, or what the server has to end with because there is no worker: 2 where the operator has
    to change something first, so that no supervisor starts it again and again.
    """

    def __init__(
        self,
        config: Config,
        view: ProgressView,
        out: TextIO,
        *,
        show_example: bool,
        stop: Callable[[], None] = lambda: signal.raise_signal(signal.SIGTERM),
    ) -> None:
        self.exit_code = 0
        self._config = config
        self._view = view
        self._out = out
        self._show_example = show_example
        self._stop = stop
        self._url = ""
        self._info: WorkerReady | None = None
        self._embedder: EmbedderReady | None = None

    def listening(self, url: str) -> None:
        """The server is bound to `url`, which has the real port."""
        logger.info("listening on %s", url)
        self._url = url
        self._print_when_complete()

    def ready(self, info: WorkerReady) -> None:
        """The worker takes requests: for the first time, or again after a restart."""
        self._view.close()
        for warning in info.warnings:
            logger.warning("%s", warning)
        if self._info is not None:
            logger.info("the worker is ready again", extra={"worker_pid": info.pid})
            return
        self._info = info
        # What is loaded stays: a full collection would walk all of it again and again, for milliseconds each.
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_AFTER_OBJECTS)
        self._print_when_complete()

    def embedder_ready(self, info: EmbedderReady) -> None:
        """The embedding worker takes requests: for the first time, or again after a restart."""
        for warning in info.warnings:
            logger.warning("%s", warning)
        if self._embedder is not None:
            logger.info("the embedding worker is ready again", extra={"worker_pid": info.pid})
            return
        self._embedder = info
        self._print_when_complete()

    def failed(self, error: MlxdError) -> None:
        """There will be no worker (the engine has logged why): ends the server, as a signal would."""
        self._fail(error, str(error))

    def embedder_failed(self, error: MlxdError) -> None:
        """There will be no embedding worker: ends the server too."""
        self._fail(error, f"the embedding model: {error}")

    def _fail(self, error: MlxdError, reason: str) -> None:
        if self.exit_code != EXIT_USAGE:  # one of two workers that the operator has to see to is enough
            self.exit_code = EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE
        self._view.close()
        logger.error("stopping: %s", reason)
        self._stop()

    def _print_when_complete(self) -> None:
        info, embedder = self._info, self._embedder
        if info is None or not self._url or (self._config.embeddings.model and embedder is None):
            return
        lines = [
            f"mlxd is ready: {model_name(self._config)} at {self._url}",
            f"  {info.device}, {info.dtype}, {info.attention} attention, {info.max_model_len:,} tokens",
        ]
        if info.memory.device_bytes:
            lines.append("  " + memory_line(info.memory))
        if embedder is not None:
            lines.append(f"  embeddings: {embedding_line(self._config, embedder)}")
        if self._show_example:
            lines += ["Try it:", "  " + curl_line(self._config, self._url)]
        print(*lines, sep="\n", file=self._out, flush=True)


def is_exposed(config: Config) -> bool:
    """Whether others than this machine can connect, without a key."""
    if config.limits.api_keys or config.server.unix_socket is not None:
        return False
    try:
        return not ipaddress.ip_address(config.server.host).is_loopback
    except ValueError:
        return config.server.host != "localhost"


def model_name(config: Config) -> str:
    """The name that responses carry."""
    return next(iter(config.model.names), config.worker.backend)


def embedding_line(config: Config, info: EmbedderReady) -> str:
    """`demo:minilm, 384 dimensions, float32, inputs of 256 tokens`"""
    kind = "cross-encoder" if info.is_cross_encoder else f"{info.size} dimensions"
    return f"{config.embeddings.names[0]}, {kind}, {info.dtype}, inputs of {info.max_model_len:,} tokens"


def memory_line(plan: MemoryPlan) -> str:
    """`memory: 0.54 GB weights + 1.00 GB KV pool (43,690 tokens) + … = 1.80 of 8.00 GB`."""
    pool_tokens = plan.kv_pool_bytes // plan.kv_bytes_per_token if plan.kv_bytes_per_token else 0
    state_bytes = plan.state_bytes + plan.snapshot_bytes
    used = plan.weights_bytes + plan.kv_pool_bytes + state_bytes + plan.activation_bytes
    states = f" + {state_bytes / 1e9:.2f} GB states" if state_bytes else ""
    return (
        f"memory: {plan.weights_bytes / 1e9:.2f} GB weights + {plan.kv_pool_bytes / 1e9:.2f} GB KV pool "
        f"({pool_tokens:,} tokens){states} + {plan.activation_bytes / 1e9:.2f} GB activations "
        f"= {used / 1e9:.2f} of {plan.device_bytes / 1e9:.2f} GB"
    )


def curl_line(config: Config, url: str) -> str:
    """A command, ready to paste, that asks the model a question."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": EXAMPLE_QUESTION}],
        "temperature": 0,
    }
    socket = config.server.unix_socket
    if socket is None:
        # A server that listens on every address is reached on this machine's own.
        where = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    else:
        where = f"--unix-socket {shlex.quote(socket)} http://localhost"
    key = ' -H "authorization: Bearer $MLXD_API_KEY"' if config.limits.api_keys else ""
    content = json.dumps(body)
    return f"curl {where}/v1/chat/completions -H 'content-type: application/json'{key} -d '{content}'"
