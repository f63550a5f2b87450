"""`with_blas.py MODULE ARG…` runs a module with the BLAS that mlxd puts under MLX on Linux CPUs.

It does not know servers. It runs in their environments, so it imports nothing of ours. The paths of the two
libraries come in MLXD_BENCH_SHIM and MLXD_BENCH_OPENBLAS; without them MLX's own stays.
"""

import ctypes
import os
import runpy
import sys


def main() -> None:
    shim_path, openblas_path = os.environ.get("MLXD_BENCH_SHIM"), os.environ.get("MLXD_BENCH_OPENBLAS")
    if shim_path and openblas_path:
        shim = ctypes.CDLL(shim_path, mode=ctypes.RTLD_LOCAL)
        if shim.mlxd_blas_init(os.fsencode(openblas_path)) != 0:
            sys.exit(f"{openblas_path} cannot be used")
        shim.mlxd_blas_set_num_threads(ctypes.c_int(len(os.sched_getaffinity(0))))
        ctypes.CDLL(shim_path, mode=ctypes.RTLD_GLOBAL)
    module = sys.argv[1]
    sys.argv = [module, *sys.argv[2:]]
    sys.path.pop(0)  # this file's folder, which the module must not see
    runpy.run_module(module, run_name="__main__", alter_sys=True)


main()
