"""Runs one of the worker's tools (`python -m mlxd.worker.NAME`) and reads the JSON it prints.

It does not know what the tools do. They run in a process of their own because they import MLX.
"""

from __future__ import annotations

import subprocess
import sys

import msgspec

from mlxd.errors import MlxdError


class ToolError(MlxdError):
    """The tool printed no JSON; the message has the last line that it printed instead."""


def run_tool(module: str, stdin: bytes = b"", *, timeout_seconds: float = 120.0) -> dict[str, object]:
    """The JSON object that `python -m module` prints. Raises ToolError."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=stdin,
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"{module} did not answer within {timeout_seconds:g} s") from None
    try:
        # Libraries may greet on standard output: the object is the last line.
        return msgspec.json.decode(done.stdout.strip().rpartition(b"\n")[2], type=dict[str, object])
    except msgspec.DecodeError:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "it printed nothing"
        raise ToolError(f"{module} ended with exit code {done.returncode}: {reason}") from None
