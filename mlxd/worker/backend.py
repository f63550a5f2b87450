"""What main.py needs of the thing that produces tokens: the model (mlx_backend.py) or playback.

It does not know MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mlxd.step import Message, WorkerReady
from mlxd.worker.disk.tier import DiskTier
from mlxd.worker.step_loop import MemoryUse, StepRunner

Send = Callable[[Message], None]


class Backend(StepRunner, Protocol):
    """Made on the worker's main thread; loads once, then launches plans."""

    disk: DiskTier | None
    """not yet started; None also before `load`"""

    def load(self) -> WorkerReady:
        """Gets everything ready, sending Progress and ModelFiles on the way.

        WorkerError: another try may help. Any other MlxdError: the operator must change something.
        """

    def memory(self) -> MemoryUse:
        """What the device holds now. Safe from any thread, at any time."""
