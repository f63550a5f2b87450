"""What a soak calls a failure."""

from __future__ import annotations

import pytest

from bench.soak import Remains, Soak


def soak(*, last: Remains | None = None, **changes: object) -> Soak:
    before = Remains(used_blocks=0, sockets=3, rss_bytes=100, objects={"asyncio.Task": 4, "mlxd.A": 1})
    clean = {
        "ok": 90,
        "cut": 10,
        "errors": {},
        "seconds": 1.0,
        "before": before,
        "after": [before, last or before],
        "idle": True,
        "integrity_errors": 0,
    }
    return Soak(**clean | changes)


def test_a_clean_soak_has_no_failures():
    assert soak().failures() == soak(refused=3).failures() == []
    assert soak(last=Remains(0, 2, 104, {"asyncio.Task": 4})).failures() == []


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (Remains(1, 3, 100), "blocks in use: 0 before, 1 after"),
        (Remains(0, 4, 100), "sockets: 3 before, 4 after"),
        (Remains(0, 3, 106), "RSS grew by 6.0%"),
        (Remains(0, 3, 100, {"asyncio.Task": 5}), "asyncio.Task: 4 before, 5 after"),
        (Remains(0, 3, 100, {"mlxd.B": 1}), "mlxd.B: 0 before, 1 after"),
    ],
)
def test_what_is_left_is_named(last, words):
    assert soak(last=last).failures() == [words]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"errors": {"timeout": 2}}, "timeout"),
        ({"cut": 0}, "no stream was cut off"),
        ({"refused": 0}, "no wrong request was refused"),
        ({"idle": False}, "requests are left"),
        ({"integrity_errors": 1}, "integrity"),
    ],
)
def test_a_soak_that_went_wrong_says_so(changes, words):
    [failure] = soak(**changes).failures()
    assert words in failure
