"""Set-up of all tests in one process: an optimised BLAS and the CPU, before any of them imports MLX."""

from __future__ import annotations

from mlxd.worker import platform

platform.prepare()
