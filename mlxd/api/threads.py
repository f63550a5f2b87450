"""Long work for one request, in a thread: hundreds of streams share the event loop.

It does not know what the work is. A thread and the loop share the interpreter: every SWITCH_SECONDS whoever
waits for it gets it, unless the other is within one call to C that keeps it, such as reading a body's JSON.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SWITCH_SECONDS = 0.001
"""For how long the loop waits for a thread that computes. Python's own default is 5 ms, and the loop may wait
at every turn it takes."""
LARGE_BODY_BYTES = 65536
"""Of JSON, from which on it is decoded in a thread: token ids take a millisecond for every 100,000 bytes."""
MANY_MESSAGES = 64
"""Of a conversation, from which on it is rendered in a thread: a template takes some 10 us for each."""


def switch_often() -> None:
    """Let no thread hold up the event loop for longer than SWITCH_SECONDS. For the whole process."""
    sys.setswitchinterval(SWITCH_SECONDS)


async def off_loop_if(is_long: bool, work: Callable[[], T]) -> T:
    """work(), in a thread where it is long."""
    return await asyncio.to_thread(work) if is_long else work()
