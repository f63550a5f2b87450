"""Times the same call on an extension and on its plain-Python twin, and prints the ratio.

It does not know what is called. Figures are nanoseconds a call, the best of several rounds: on a shared
machine the best is what repeats.
"""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from timeit import Timer

from bench.report import commit, machine, versions

ROUNDS = 7
ROUND_SECONDS = 0.02


@dataclass(slots=True, frozen=True)
class Case:
    """One call on both implementations."""

    name: str
    extension: Callable[[], object]
    twin: Callable[[], object]


def nanoseconds(call: Callable[[], object]) -> float:
    """The best of ROUNDS rounds of about ROUND_SECONDS, a call."""
    timer = Timer(call)
    once = min(timer.repeat(3, 1))
    number = max(1, int(ROUND_SECONDS / max(once, 1e-9)))
    return min(timer.repeat(ROUNDS, number)) / number * 1e9


def report(benchmark: str, cases: Sequence[Case]) -> None:
    """Print what ran where, then a row a case."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{benchmark}  {now}  commit {commit()}")
    for facts in (machine(), versions()):
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
    width = max(len(case.name) for case in cases)
    print(f"\n{'ns a call':<{width}}  {'extension':>12} {'twin':>12} {'ratio':>8}")
    gc.collect()
    for case in cases:
        extension, twin = nanoseconds(case.extension), nanoseconds(case.twin)
        print(f"{case.name:<{width}}  {extension:>12,.0f} {twin:>12,.0f} {twin / extension:>7.1f}x")
