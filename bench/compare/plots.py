"""A comparison's figures as plots: throughput, time to the first token and gaps over the number of clients.

It does not know how they were measured. Needs matplotlib, which is in no extra but `plots`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_CHAT = re.compile(r"chat, (\d+) clients")

PANELS = (
    ("output tokens/s", lambda s: s["output_tokens_per_second"]),
    ("ttft p50, s", lambda s: s["latency_ms"]["ttft"]["p50"] / 1000),
    ("longest gap within a stream, s", lambda s: s["latency_ms"]["max_gap"]["max"] / 1000),
)


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG of one panel a figure."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4.2 * len(PANELS), 3.6), layout="constrained")
    for axis, (title, value) in zip(axes, PANELS, strict=True):
        for name, server in result["result"].items():
            points = []
            for scenario, figures in server.get("scenarios", {}).items():
                match = _CHAT.fullmatch(scenario)
                if match and "failed" not in figures and figures["latency_ms"]["max_gap"]:
                    points.append((int(match[1]), value(figures)))
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(title=title, xlabel="clients", xscale="log")
        axis.set_xticks(sorted({x for line in axis.lines for x in line.get_xdata()}))
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    machine = result["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, {result['date'][:10]}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
