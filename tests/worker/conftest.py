"""Set-up of the worker's tests: an optimised BLAS and the CPU, before anything imports MLX."""

from __future__ import annotations

from mlxd.worker import platform

platform.prepare()
