"""From records to figures: percentiles, throughput, errors by kind; and the table on the terminal.

It does not know how the load was made. All times are milliseconds here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.serve.load import Load
from bench.serve.record import Record

PERCENTILES = (50, 90, 95, 99)
LATENCIES = (
    ("ttft", "first text"),
    ("itl", "a token"),
    ("tpot", "a token"),
    ("e2e", "all"),
    ("max_gap", "a stream"),
)


def percentiles(seconds: Iterable[float]) -> dict[str, float] | None:
    """mean, p50 … p99 and max in ms (linear interpolation), and the count; None without values."""
    values = np.fromiter(seconds, dtype=np.float64) * 1000
    if not values.size:
        return None
    summary = {"count": float(values.size), "mean": float(values.mean())}
    for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        summary[f"p{p}"] = float(value)
    summary["max"] = float(values.max())
    return summary


def summarise(load: Load, *, client_cpu_seconds: float) -> dict[str, object]:
    """The figures of a run.

    Latencies are of requests that ended `ok`. itl has one value for each chunk with text after a stream's
    first: the gap before it, divided by the tokens that a gap of that stream stands for on average
    (usage's completion_tokens - 1 over the number of gaps), so that servers which send several tokens a
    chunk compare with those that send one. `max_gap` is not divided: it is the stall that a reader sees.
    Throughput counts tokens of `ok` requests by `usage`, over the whole run from first send to last end.
    """
    done = [record for record in load.records if record.outcome == "ok"]
    outcomes = Counter(record.outcome for record in load.records)
    num_cut = outcomes.pop("cut", 0)
    num_refused = outcomes.pop("refused", 0)
    del outcomes["ok"]
    output_tokens = sum(record.output_tokens for record in done)
    prompt_tokens = sum(record.prompt_tokens for record in done)
    return {
        "requests": len(load.records),
        "ok": len(done),
        "cut": num_cut,
        "refused": num_refused,
        "errors": dict(outcomes.most_common()),
        "error_examples": _examples(load.records),
        "without_usage": sum(not record.has_usage for record in done),
        "seconds": load.seconds,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(record.cached_tokens for record in done),
        "output_tokens": output_tokens,
        "text_chunks": sum(record.num_text_chunks for record in done),
        "requests_per_second": len(done) / load.seconds,
        "prompt_tokens_per_second": prompt_tokens / load.seconds,
        "output_tokens_per_second": output_tokens / load.seconds,
        "latency_ms": {
            "ttft": percentiles(r.ttft for r in done if r.ttft is not None),
            "itl": percentiles(gap / r.tokens_per_gap for r in done for gap in r.gaps),
            "tpot": percentiles(r.tpot for r in done if r.tpot is not None),
            "e2e": percentiles(r.e2e for r in done),
            "max_gap": percentiles(max(r.gaps) for r in done if r.gaps),
        },
        "client": {
            "cpu_share": client_cpu_seconds / load.seconds,
            "late_ms": load.late_seconds * 1000,
        },
    }


def print_summary(summary: dict[str, object], console: Console) -> None:
    """The same figures, for people."""
    latency = summary["latency_ms"]
    assert isinstance(latency, dict)
    table = Table(title="latency, ms", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("mean", *(f"p{p}" for p in PERCENTILES), "max", "count"):
        table.add_column(column, justify="right")
    for name, meaning in LATENCIES:
        if (row := latency[name]) is not None:
            cells = [f"{row[c]:,.2f}" for c in ("mean", *(f"p{p}" for p in PERCENTILES), "max")]
            table.add_row(f"{name} [dim]{meaning}[/]", *cells, f"{row['count']:,.0f}")
    console.print(table)
    console.print(
        f"{summary['ok']} of {summary['requests']} requests ok, {summary['cut']} cut by us, "
        f"errors {summary['errors'] or 'none'}, in {summary['seconds']:.2f} s"
    )
    for kind, message in summary["error_examples"].items():  # type: ignore[attr-defined]
        console.print(f"  {kind}: {message}", markup=False)
    console.print(
        f"[bold]{summary['output_tokens_per_second']:,.1f}[/] output tokens/s, "
        f"{summary['prompt_tokens_per_second']:,.1f} prompt tokens/s, "
        f"{summary['requests_per_second']:,.2f} requests/s"
    )
    client = summary["client"]
    assert isinstance(client, dict)
    console.print(f"client: {client['cpu_share']:.0%} of a core, at most {client['late_ms']:.1f} ms late")
    if client["cpu_share"] > 0.8:
        console.print("[yellow]The client was close to its limit: these figures are its own as much.[/]")
    if summary["without_usage"]:
        console.print(
            f"[yellow]{summary['without_usage']} answers carried no usage: their tokens are missing.[/]"
        )


def _examples(records: Sequence[Record]) -> dict[str, str]:
    """One message for each kind of error."""
    well = ("ok", "cut", "refused")
    return {r.outcome: r.error_message for r in reversed(records) if r.outcome not in well}
