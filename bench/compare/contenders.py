"""The servers that are compared: how each is started, and in which environment.

It does not know workloads. Flags are those that each server's own documentation gives for many clients.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = Path(__file__).with_name("with_blas.py")


@dataclass(frozen=True, slots=True)
class Contender:
    """A server. `arguments` gives its command line from (model folder, port, clients at most)."""

    name: str
    package: str
    module: str
    arguments: Callable[[Path, int, int], Sequence[str]]
    health_path: str = "/health"
    needs_model_name: bool = False
    """It answers to the folder's name only, not to `default`."""

    def command(self, python: Path, model: Path, port: int, max_clients: int) -> list[str]:
        """The whole command. All run under the same BLAS (with_blas.py): on Linux CPUs the one that MLX
        brings is a hundred times slower, and the comparison would be one of that."""
        return [str(python), str(LAUNCHER), self.module, *self.arguments(model, port, max_clients)]

    def version(self, python: Path) -> dict[str, str]:
        """Versions of the server and of what computes, as its environment has them."""
        code = (
            "import importlib.metadata as m, json, sys; "
            "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}; "
            "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
        )
        names = [self.package, "mlx", "mlx-lm", "torch"]
        output = subprocess.run(
            [str(python), "-c", code, *names], capture_output=True, text=True, check=True
        ).stdout
        versions: dict[str, str] = json.loads(output)
        return versions


def _mlxd(model: Path, port: int, max_clients: int) -> Sequence[str]:
    return [
        *("serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--max-num-seqs", str(max_clients), "--cache-memory-mb", "2048"),
    ]


def _mlx_lm(model: Path, port: int, max_clients: int) -> Sequence[str]:
    return [
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--decode-concurrency", str(max_clients), "--prompt-concurrency", str(min(8, max_clients))),
    ]


def _vllm_mlx(model: Path, port: int, max_clients: int) -> Sequence[str]:
    return [
        *("serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--continuous-batching", "--use-paged-cache", "--max-num-seqs", str(max_clients)),
    ]


CONTENDERS = {
    "mlxd": Contender("mlxd", "mlxd", "mlxd", _mlxd, "/health/ready"),
    "mlx-lm": Contender("mlx-lm", "mlx-lm", "mlx_lm.server", _mlx_lm, needs_model_name=True),
    "vllm-mlx": Contender("vllm-mlx", "vllm-mlx", "vllm_mlx.cli", _vllm_mlx, needs_model_name=True),
}
