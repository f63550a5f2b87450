"""The worker process: `python -m mlxd.worker.main --fd N`, N its end of the socketpair to the front.

It knows neither requests nor HTTP, and imports MLX only after platform.prepare(). Exit codes: 0 after
Shutdown or SIGTERM, 1 otherwise; before it exits for a reason of its own it sends WorkerFailure.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from mlxd import log
from mlxd.config import Config
from mlxd.errors import MlxdError, WorkerError
from mlxd.step import PROTOCOL_VERSION, ToWorker, WorkerFailure, WorkerInit
from mlxd.worker.backend import Backend, Send
from mlxd.worker.channel import Channel
from mlxd.worker.embeddings.loop import EmbedLoop
from mlxd.worker.heartbeat import Activity, Pulse, exit_now
from mlxd.worker.step_loop import StepLoop

if TYPE_CHECKING:
    from mlxd.worker.embeddings.backend import EmbeddingBackend

logger = logging.getLogger("mlxd.worker.main")  # whose own name is __main__

PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the worker; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mlxd.worker.main", description="mlxd's worker process (internal).")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket")
    arguments = parser.parse_args(argv)
    # Ctrl-C reaches the whole process group; the front decides when the worker goes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)
    die_with_parent()
    channel: Channel[ToWorker] = Channel(socket.socket(fileno=arguments.fd), ToWorker)  # type: ignore[arg-type]
    try:
        return run(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        logger.info("the front is gone")
        return 1
    finally:
        channel.close()


def run(channel: Channel[ToWorker]) -> int:
    """Loads what the first message asks for and serves steps. EOFError, OSError: the front is gone."""
    activity = Activity()
    pulse: Pulse | None = None
    loading = True
    try:
        init = channel.receive()
        config = read_init(init)
        log.setup(config.log.level, config.log.format, sys.stderr)
        backend: Backend | EmbeddingBackend
        loop: StepLoop | EmbedLoop
        if isinstance(init, WorkerInit) and init.role == "embed":
            backend = make_embedding_backend(config, channel.send)
            loop = EmbedLoop(channel, backend, activity)
        else:
            backend = generator = make_backend(config, channel.send)
            loop = StepLoop(channel, backend, activity, memory=backend.memory, disk=lambda: generator.disk)
        pulse = Pulse(channel.send, activity, lambda: backend.memory().active, on_orphaned=exit_now)
        pulse.start()
        channel.send(backend.load())
        loading = False
        # What was made so far stays: the collector need not look at it again at every step.
        gc.collect()
        gc.freeze()
        loop.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        if isinstance(error, MlxdError):
            logger.error("%s", error)
        else:
            logger.exception("the worker failed")
        channel.send(failure(error, loading))
        return 1
    finally:
        if pulse is not None:
            pulse.stop()
    return 0


def read_init(message: ToWorker) -> Config:
    """The configuration in the first message. WorkerError when front and worker are of different versions:
    mlxd was installed anew, and another start of the server is all it takes."""
    if not isinstance(message, WorkerInit) or message.protocol_version != PROTOCOL_VERSION:
        raise WorkerError(f"the server does not speak the worker's protocol {PROTOCOL_VERSION}: restart it")
    try:
        return msgspec.convert(message.config, Config)
    except msgspec.ValidationError as error:
        raise WorkerError(f"the worker does not understand the configuration: {error}") from None


def make_backend(config: Config, send: Send) -> Backend:
    """The backend that the configuration names, not yet loaded."""
    if config.worker.backend == "playback":
        from mlxd.worker.playback import PlaybackBackend

        return PlaybackBackend(config, send)
    from mlxd.worker import lean_import, platform

    blas = platform.prepare(config.worker.threads)
    lean_import.install()
    from mlxd.worker.mlx_backend import MlxBackend

    return MlxBackend(config, send, blas)


def make_embedding_backend(config: Config, send: Send) -> EmbeddingBackend:
    """That of a worker of role `embed`, not yet loaded."""
    from mlxd.worker import lean_import, platform

    blas = platform.prepare(config.embeddings.threads)
    lean_import.install()
    from mlxd.worker.embeddings.backend import EmbeddingBackend

    return EmbeddingBackend(config.embeddings, send, blas)


def failure(error: Exception, loading: bool) -> WorkerFailure:
    """The last word: for users, so no paths and no trace (these are in the log)."""
    if isinstance(error, MlxdError):
        return WorkerFailure(str(error), fatal=loading and not isinstance(error, WorkerError))
    doing = "loading the model" if loading else "running a step"
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "alloc" in text:
        return WorkerFailure(f"the device ran out of memory while {doing}", fatal=False)
    return WorkerFailure(f"the worker failed while {doing} ({type(error).__name__})", fatal=False)


def on_terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def die_with_parent() -> None:
    """On Linux the kernel kills us when the front dies; elsewhere the heartbeat notices in a second."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
