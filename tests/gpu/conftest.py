"""Tests that need a GPU (`make gpu`), skipped elsewhere; tests/worker runs the same kernels on g++."""

from __future__ import annotations

import pytest

from mlxd.worker import platform

platform.prepare()

import mlx.core as mx  # noqa: E402

from mlxd.worker.kernels.paged import PagedKernels, gpu_kernels  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if mx.default_device() != mx.cpu:
        return
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that MLX can use"))


@pytest.fixture(scope="session")
def kernels() -> PagedKernels:
    made = gpu_kernels(platform.detect_device(), mx.bfloat16)
    assert made is not None
    return made
