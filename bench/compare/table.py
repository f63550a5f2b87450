"""A comparison's figures as a table in Markdown.

It does not know how they were measured.
"""

from __future__ import annotations

from typing import Any

COLUMNS = (
    ("output tokens/s", lambda s: f"{s['output_tokens_per_second']:.1f}"),
    ("ttft p50 / p99, s", lambda s: _two(s, "ttft", 1000, 2)),
    ("itl p50 / p99, ms", lambda s: _two(s, "itl", 1, 0)),
    ("longest gap, s", lambda s: _one(s, "max_gap", "max", 1000)),
    ("failed", lambda s: str(sum(s["errors"].values()))),
    ("CPU s", lambda s: f"{s['server_cpu_seconds']:.0f}"),
)


def markdown(result: dict[str, Any]) -> str:
    """One row for each scenario and server; what could not be measured says why."""
    servers: dict[str, Any] = result["result"]
    machine = result["machine"]
    lines = [
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, commit {result['commit']}, "
        f"seed {result['seed']}",
        "",
    ]
    for name, server in servers.items():
        if "failed" in server:
            lines.append(f"- {name}: failed: {server['failed'][:300]}")
            continue
        versions = ", ".join(f"{package} {version}" for package, version in server["versions"].items())
        lines.append(
            f"- {name}: {versions}; up after {server['start_seconds']:.1f} s, "
            f"peak {server['peak_rss_bytes'] / 1e9:.2f} GB; `{' '.join(server['command'])}`"
        )
    lines += ["", "| | server | " + " | ".join(title for title, _ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    names = {scenario for server in servers.values() for scenario in server.get("scenarios", ())}
    order = [name for server in servers.values() for name in server.get("scenarios", ())]
    for scenario in dict.fromkeys(name for name in order if name in names):
        for name, server in servers.items():
            figures = server.get("scenarios", {}).get(scenario)
            if figures is None:
                continue
            if "failed" in figures:
                cells = [f"failed: {figures['failed'][:120]}", *[""] * (len(COLUMNS) - 1)]
            else:
                cells = [cell(figures) for _, cell in COLUMNS]
            lines.append(f"| {scenario} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _two(figures: dict[str, Any], name: str, divisor: float, digits: int) -> str:
    row = figures["latency_ms"][name]
    return "-" if row is None else f"{row['p50'] / divisor:.{digits}f} / {row['p99'] / divisor:.{digits}f}"


def _one(figures: dict[str, Any], name: str, key: str, divisor: float) -> str:
    row = figures["latency_ms"][name]
    return "-" if row is None else f"{row[key] / divisor:.2f}"
