"""Builds the Cython extensions of ext/ into mlxd/_ext/; everything else is in pyproject.toml."""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("MLXD_DEBUG") == "1"

COMPILE_ARGS = ["-O0", "-g"] if DEBUG else ["-O3"]

extensions = [
    Extension(f"mlxd._ext.{name}", [f"ext/{name}.pyx"], extra_compile_args=COMPILE_ARGS)
    for name in ("block_table", "sse")
]
extensions = cythonize(
    extensions,
    build_dir="build/cython",
    force=True,
    compiler_directives={
        "language_level": 3,
        "warn.undeclared": False,
        "warn.unreachable": True,
    },
    compile_time_env={"DEBUG": DEBUG},
)
if sys.platform == "linux":
    # Not a Python module: a library that gives MLX's CPU build a fast BLAS (mlxd/worker/platform.py).
    extensions.append(
        Extension("mlxd._ext.blas_shim", ["ext/blas_shim.c"], extra_compile_args=["-O2"], libraries=["dl"])
    )

setup(ext_modules=extensions)
