"""Pinned prefixes: prompts whose keys and values stay in the cache for a time, whatever else is evicted.

It does not know HTTP or texts. A pin holds full blocks: of a prompt's last, partial one nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from mlxd.engine.prefix_match import Held
from mlxd.engine.request import GenerationRequest
from mlxd.errors import InvalidRequestError, MlxdError, NotFoundError, WorkerError

if TYPE_CHECKING:
    from mlxd.engine.engine import Engine
    from mlxd.engine.kv_manager import KvManager

logger = logging.getLogger(__name__)

MB = 1e6
NOTHING = Held([])


@dataclass(slots=True, eq=False)
class Pin:
    """`num_tokens` are held now: none while they are computed, for the first time or after a new worker's
    start. `num_blocks` count against the quota from the beginning, one at the least, so that the quota bounds
    how many pins there are. `expires_at` is of the engine's clock."""

    pin_id: str
    prompt: GenerationRequest
    num_blocks: int
    expires_at: float
    num_tokens: int = 0
    held: Held = NOTHING
    timer: asyncio.TimerHandle | None = None

    @property
    def block_ids(self) -> list[int]:
        return self.held.block_ids


class PinBoard:
    """All pins of an engine. Everything runs on its event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pins: dict[tuple[str, str], Pin] = {}
        self._num_computed = 0
        self._restoring: dict[Pin, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._pins)

    def of(self, client: str | None) -> list[Pin]:
        """The pins of `client`; of everybody, if None."""
        return [pin for (owner, _), pin in self._pins.items() if client in (None, owner)]

    async def pin(self, pin_id: str, prompt: GenerationRequest, ttl_seconds: float) -> Pin:
        """Compute what is not cached of `prompt`, and hold it. A client's pin of the same id is replaced.

        Raises InvalidRequestError: it is larger than what the client, or all of them, may pin; and what
        Engine.submit and the computing raise.
        """
        client = prompt.client
        pin = Pin(
            pin_id,
            prompt,
            num_blocks=max(1, len(prompt.prompt_token_ids) // self._kv().block_size),
            expires_at=self._engine.now() + ttl_seconds,
        )
        self._check_quota(pin)
        self._forget(client, pin_id)
        self._pins[client, pin_id] = pin
        try:
            await self._compute(pin)
        except BaseException:
            if self._pins.get((client, pin_id)) is pin:
                self._forget(client, pin_id)
            raise
        if self._pins.get((client, pin_id)) is pin:
            loop = asyncio.get_running_loop()
            left = max(0.0, pin.expires_at - self._engine.now())
            pin.timer = loop.call_later(left, self._forget, client, pin_id)
        return pin

    def unpin(self, pin_id: str, client: str) -> None:
        """Raises NotFoundError."""
        if (client, pin_id) not in self._pins:
            raise NotFoundError(f"there is no pin {pin_id[:200]!r}")
        self._forget(client, pin_id)

    def give_way(self) -> bool:
        """Let go of the pin that expires first, because a request cannot run for want of blocks; whether
        there was one that held any."""
        holding = [pin for pin in self._pins.values() if pin.block_ids]
        if not holding:
            return False
        pin = min(holding, key=lambda pin: pin.expires_at)
        logger.warning("pin %s gives way to a request that needs its blocks", pin.pin_id)
        self._forget(pin.prompt.client, pin.pin_id)
        return True

    def on_worker_lost(self) -> None:
        """What was held is gone, with the pool. What is being restored goes on with the next worker, like any
        request."""
        for pin in self._pins.values():
            pin.held, pin.num_tokens = NOTHING, 0

    def on_worker_ready(self) -> None:
        """Compute again what was lost."""
        for pin in self._pins.values():
            if not pin.block_ids and pin.timer is not None and pin not in self._restoring:
                self._restoring[pin] = asyncio.get_running_loop().create_task(self._restore(pin))

    def stop(self) -> None:
        for task in self._restoring.values():
            task.cancel()
        for client, pin_id in list(self._pins):
            self._forget(client, pin_id)

    async def _restore(self, pin: Pin) -> None:
        try:
            await self._compute(pin)
        except WorkerError:  # the next one might die of it, too
            logger.error("pin %s is dropped: too many workers died while they computed it", pin.pin_id)
            if self._pins.get((pin.prompt.client, pin.pin_id)) is pin:
                self._forget(pin.prompt.client, pin.pin_id)
        except MlxdError as error:
            logger.warning("pin %s could not be restored: %s", pin.pin_id, error)
        finally:
            del self._restoring[pin]

    async def _compute(self, pin: Pin) -> None:
        engine, prompt = self._engine, pin.prompt
        self._num_computed += 1
        await engine.submit([_numbered(prompt, self._num_computed)]).drain()
        if self._pins.get((prompt.client, pin.pin_id)) is not pin or engine.scheduler is None:
            return
        kv = self._kv()
        pin.held = kv.hold(kv.hash_tokens(prompt.prompt_token_ids, prompt.cache_salt))
        pin.num_tokens = len(pin.block_ids) * kv.block_size

    def _check_quota(self, pin: Pin) -> None:
        engine, kv = self._engine, self._kv()
        info, cache = engine.info, engine.config.cache
        assert info is not None
        if not kv.prefix_caching:
            raise InvalidRequestError("nothing can be pinned: this server's prefix cache is off")
        block_bytes = info.memory.kv_bytes_per_token * kv.block_size
        state_bytes = info.memory.snapshot_bytes // info.num_snapshots if info.num_snapshots else 0

        def size_mb(pins: Iterable[Pin]) -> float:
            return sum(pin.num_blocks * block_bytes + state_bytes for pin in pins) / MB

        client = pin.prompt.client
        others = {key: other for key, other in self._pins.items() if key != (client, pin.pin_id)}
        mine = size_mb(other for (owner, _), other in others.items() if owner == client)
        if mine + size_mb([pin]) > cache.pin_quota_mb:
            raise InvalidRequestError(
                f"the pin needs {size_mb([pin]):.1f} MB, and of {cache.pin_quota_mb} MB "
                f"{mine:.1f} are taken by other pins",
                code="pin_quota_exceeded",
            )
        # Pins of one prompt share its state; they are counted as if each had its own.
        if kv.states is not None and len(others) >= kv.states.max_held:
            raise InvalidRequestError(
                f"a pin holds a state of the model's recurrent layers; {kv.states.max_held} of the "
                f"{kv.states.num_snapshots} that can be kept may be held, and there are as many pins",
                code="pin_quota_exceeded",
            )
        all_blocks = _num_blocks(others.values()) + pin.num_blocks
        if all_blocks > cache.max_pinned_percent * kv.num_total_blocks:
            raise InvalidRequestError(
                f"with this pin {all_blocks} of {kv.num_total_blocks} blocks would be pinned, more than the "
                f"{cache.max_pinned_percent:.0%} that may be",
                code="pin_quota_exceeded",
            )

    def _forget(self, client: str, pin_id: str) -> None:
        pin = self._pins.pop((client, pin_id), None)
        if pin is None:
            return
        if pin.timer is not None:
            pin.timer.cancel()
        scheduler = self._engine.scheduler
        if pin.block_ids and scheduler is not None:
            scheduler.kv.unhold(pin.held)
        pin.held = NOTHING

    def _kv(self) -> KvManager:
        self._engine.check_ready()
        scheduler = self._engine.scheduler
        assert scheduler is not None
        return scheduler.kv


def _num_blocks(pins: Iterable[Pin]) -> int:
    return sum(pin.num_blocks for pin in pins)


def _numbered(prompt: GenerationRequest, number: int) -> GenerationRequest:
    return msgspec.structs.replace(prompt, request_id=f"pin.{number}")
