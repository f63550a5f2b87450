"""How long the CUDA device is busy, and with what: CUPTI's records, through PyTorch's profiler.

It does not know what runs. PyTorch is no dependency of ours: without it there are no figures.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

LONGEST_NAME = 70


def kernel_seconds(run: Callable[[], None], warm: bool = True) -> dict[str, tuple[float, int]] | None:
    """Kernels by name: seconds in all, and how many; the longest first. None where nothing can record."""
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.zeros(1, device="cuda")
    except Exception:
        # No torch, no CUDA in it, or a driver that does not let it record.
        return None
    if warm:
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[str, tuple[float, int]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            name = event["name"][:LONGEST_NAME]
            seconds, count = found.get(name, (0.0, 0))
            found[name] = seconds + event["dur"] / 1e6, count + 1
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
