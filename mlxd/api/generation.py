"""A running generation, and whatever may end it early.

It does not know prompts, texts or dialects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

from mlxd.api.http import HTTPRequest
from mlxd.api.threads import off_loop_if
from mlxd.engine.request import FinishReason, RequestOutput
from mlxd.engine.stream import OutputStream
from mlxd.errors import ClientClosedRequest, HTTPStatusError, InternalError

logger = logging.getLogger("mlxd.api")

T = TypeVar("T")

INLINE_OUTPUTS = 256
"""Outputs, and tokens with log-probabilities of up to 20 alternatives each, that become JSON in some
milliseconds."""

_BADNESS = ["", *(reason.value for reason in FinishReason)]
"""Of several sequences, the one that ended worst says how the request did."""


class Generation:
    """Watches over an output stream, and its client, while an answer is made of it.

    An async context manager. What ends it early is kept in `cause`, and the stream cancelled, which then
    ends by itself. On leaving, what still runs is aborted. It charges the caller for what is generated, and
    notes for the access line how it went.
    """

    __slots__ = (
        "_active",
        "_is_metered",
        "_num_before",
        "_num_charged",
        "_request",
        "_watcher",
        "_work",
        "cause",
        "response_id",
        "stream",
    )

    def __init__(
        self,
        response_id: str,
        stream: OutputStream,
        request: HTTPRequest,
        active: ActiveGenerations,
    ) -> None:
        self.response_id = response_id
        self.stream = stream
        self.cause: HTTPStatusError | None = None
        self._request = request
        self._active = active
        self._num_charged = 0
        self._num_before = request.access.get("completion_tokens", 0)
        self._is_metered = request.caller.account.limits_tokens
        self._watcher: asyncio.Task[None] | None = None
        self._work: asyncio.Task[Any] | None = None

    @property
    def ids(self) -> tuple[str, str]:
        """The ids under which it can be cancelled: what the response carries in its body and its headers."""
        return self.response_id, self._request.request_id

    @property
    def client_name(self) -> str | None:
        return self._request.caller.name

    @property
    def is_between_streams(self) -> bool:
        """Whether its stream has ended, and what the answer needs besides is on its way (`run`)."""
        return self._work is not None

    def end(self, cause: HTTPStatusError) -> None:
        """End it early. The first cause counts."""
        if self.cause is None:
            self.cause = cause
            self._request.access["finish_reason"] = FinishReason.ABORT.value
            self.stream.cancel()
            self._charge()
            if self._work is not None:
                self._work.cancel()

    async def run(
        self,
        work: Coroutine[Any, Any, T],
        ping: Callable[[], Coroutine[Any, Any, None]] | None = None,
        ping_seconds: float | None = None,
    ) -> T:
        """What `work` gives, which the answer needs after the stream has ended. Every `ping_seconds` of it
        the client is sent a `ping`, if there is one.

        Raises what `work` and `ping` do, and the `cause` that ended the request meanwhile.
        """
        async with self:
            task: asyncio.Task[T] = asyncio.get_running_loop().create_task(work)
            self._work = task
            if self.cause is not None:  # since the stream ended
                task.cancel()
            try:
                while ping is not None and not (await asyncio.wait((task,), timeout=ping_seconds))[0]:
                    await ping()
                return await task
            except asyncio.CancelledError:
                if self.cause is None:
                    raise
                raise self.cause from None
            finally:
                self._work = None
                if not task.done():
                    task.cancel()
                    await asyncio.wait((task,))
                if not task.cancelled():
                    task.exception()  # asked for, or asyncio logs it where a ping's was raised in its place

    def note(self, outputs: list[RequestOutput]) -> HTTPStatusError | None:
        """Charge what came since the last call. Returns why one of `outputs` failed, if one did."""
        if self._is_metered:
            self._charge()
        failure = None
        for output in outputs:
            reason = output.finish_reason
            if reason is not None:
                self._charge()
                known = self._request.access.get("finish_reason", "")
                self._request.access["finish_reason"] = max(known, reason.value, key=_BADNESS.index)
                failure = failure or output_error(output)
        return failure

    def _charge(self) -> None:
        num_tokens = self.stream.num_tokens
        if num_tokens > self._num_charged:
            self._request.caller.account.take_tokens(num_tokens - self._num_charged)
            self._num_charged = num_tokens
        self._request.access["completion_tokens"] = self._num_before + num_tokens

    async def __aenter__(self) -> Generation:
        self._watcher = asyncio.get_running_loop().create_task(self._watch_client())
        self._active.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active.remove(self)
        if self._watcher is not None:
            self._watcher.cancel()
            # Told so by an exception whose traceback refers to this: both would wait for the collector.
            self._watcher = None
        self.stream.cancel()
        self._charge()

    async def _watch_client(self) -> None:
        await self._request.disconnected()
        self.end(ClientClosedRequest("the client left"))


def cancelled() -> ClientClosedRequest:
    """The error of a request that was cancelled by its id."""
    return ClientClosedRequest("the request was cancelled", code="request_cancelled")


class Cancellable(Protocol):
    """What runs for a request and can be ended."""

    @property
    def ids(self) -> tuple[str, str]:
        """Under which it can be cancelled."""

    @property
    def client_name(self) -> str | None:
        """Whose it is: the name of an API key, if there are any."""

    def end(self, cause: HTTPStatusError, /) -> None: ...


class ActiveGenerations:
    """All that run now, by response id and by request id (which two requests of a client may share)."""

    __slots__ = ("_by_id",)

    def __init__(self) -> None:
        self._by_id: dict[str, list[Cancellable]] = {}

    def add(self, generation: Cancellable) -> None:
        for key in generation.ids:
            self._by_id.setdefault(key, []).append(generation)

    def remove(self, generation: Cancellable) -> None:
        for key in generation.ids:
            found = self._by_id[key]
            found.remove(generation)
            if not found:
                del self._by_id[key]

    def cancel(self, key: str, client_name: str | None) -> bool:
        """End what runs under that id for that client; whether there was anything."""
        mine = [g for g in self._by_id.get(key, ()) if g.client_name == client_name]
        for generation in mine:
            generation.end(cancelled())
        return bool(mine)

    def end_between_streams(self, cause: HTTPStatusError) -> None:
        """End those of which the engine has nothing at the moment, so that it cannot end them."""
        for running in self._by_id.values():
            for generation in running:
                if isinstance(generation, Generation) and generation.is_between_streams:
                    generation.end(cause)


def output_error(output: RequestOutput) -> HTTPStatusError | None:
    """Why the sequence failed; None while it runs or when it ended well.

    What is not meant for clients becomes an InternalError, and is logged.
    """
    if output.finish_reason not in (FinishReason.ABORT, FinishReason.ERROR):
        return None
    error = output.error
    if error is None:
        return cancelled()
    if isinstance(error, HTTPStatusError):
        return error
    logger.error("generation failed", exc_info=error)
    return InternalError("generation failed")


async def off_loop(outputs: Sequence[RequestOutput], work: Callable[[], T]) -> T:
    """work(), which makes an answer of `outputs`: in a thread if they or their log-probabilities are many."""
    count = sum(1 + len(output.prompt_logprobs or ()) + len(output.logprobs or ()) for output in outputs)
    return await off_loop_if(count > INLINE_OUTPUTS, work)


async def gather_outputs(generation: Generation, num_sequences: int) -> list[RequestOutput]:
    """All that each sequence gave, as one output each, in the order of their index.

    Raises:
        HTTPStatusError: one failed, or the generation was ended early; the others are aborted.
    """
    gathered: dict[int, RequestOutput] = {}
    texts: list[list[str]] = [[] for _ in range(num_sequences)]
    async with generation:
        async for outputs in generation.stream:
            error = generation.note(outputs)
            if error is not None:
                raise generation.cause or error
            for output in outputs:
                # Joined at the end: adding to a long string again and again would be quadratic.
                texts[output.index].append(output.text)
                output.text = ""
                whole = gathered.setdefault(output.index, output)
                if whole is not output:
                    whole.absorb(output)
        if generation.cause is not None:
            raise generation.cause
    for index, output in gathered.items():
        output.text = "".join(texts[index])
    return [gathered[index] for index in range(num_sequences)]
