"""The prefix cache over HTTP: its figures, clearing it, and pins.

It does not know blocks or how prompts become tokens.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from mlxd.api.http import HTTPRequest
from mlxd.api.openai.schema import CacheSalt
from mlxd.api.services import Services, of_caller
from mlxd.api.tokenize import PromptFields, encode_prompt
from mlxd.engine.pins import Pin
from mlxd.engine.request import GenerationRequest
from mlxd.errors import PermissionDeniedError

DEFAULT_TTL_SECONDS = 3600.0
MAX_TTL_SECONDS = 30 * 86400.0


class PinRequest(PromptFields, kw_only=True):
    """POST /v1/cache/pins: a `prompt`, or `messages` (by default without what invites an answer).

    A pin of the same `id` is replaced; without one it gets an id. `cache_salt` is that of the requests
    which are to find it.
    """

    id: Annotated[str, Meta(pattern="^[A-Za-z0-9._:-]{1,128}$")] | None = None
    ttl_seconds: Annotated[float, Meta(gt=0, le=MAX_TTL_SECONDS)] | None = None
    cache_salt: CacheSalt | None = None


async def cache_stats(request: HTTPRequest, services: Services) -> None:
    """What the prefix cache holds, and how often it was of use."""
    await request.respond_json(200, services.engine.cache_status())


async def clear_cache(request: HTTPRequest, services: Services) -> None:
    """Forget all that is cached and neither in use nor pinned. Where there are several API keys, it takes one
    of an administrator."""
    if not request.caller.is_admin:
        raise PermissionDeniedError("clearing the cache of all takes a key with `admin: true`")
    services.engine.check_ready()
    num_blocks = await services.engine.clear_cache()
    await request.respond_json(200, {"object": "cache", "cleared_blocks": num_blocks})


async def create_pin(request: HTTPRequest, services: Services) -> None:
    """Compute a prompt's keys and values, and keep them from eviction for `ttl_seconds`."""
    fields = await services.read(request, PinRequest)
    if fields.add_generation_prompt is None:
        fields.add_generation_prompt = False
    services.model.check_name(fields.model)
    services.engine.check_ready()
    token_ids = await encode_prompt(fields, services.model)
    caller = request.caller
    caller.account.check_tokens(len(token_ids))
    prompt = GenerationRequest(
        request_id="", prompt_token_ids=token_ids, max_tokens=0, cache_salt=fields.cache_salt or ""
    )
    ttl = fields.ttl_seconds or DEFAULT_TTL_SECONDS
    pins = services.engine.pins
    pin_id = fields.id or f"pin-{services.new_id()}"
    pin = await request.unless_gone(pins.pin(pin_id, of_caller(prompt, caller), ttl))
    caller.account.take_tokens(len(token_ids))
    await request.respond_json(200, _pin(pin, services))


async def list_pins(request: HTTPRequest, services: Services) -> None:
    """The caller's pins; an administrator sees all."""
    caller = request.caller
    pins = services.engine.pins.of(None if caller.is_admin else caller.client)
    await request.respond_json(200, {"object": "list", "data": [_pin(pin, services) for pin in pins]})


async def delete_pin(request: HTTPRequest, services: Services) -> None:
    """Let go of one of the caller's pins; what it held stays cached until it is evicted."""
    services.engine.pins.unpin(request.path_param, request.caller.client)
    await request.respond_json(200, {"id": request.path_param, "object": "cache.pin", "deleted": True})


def _pin(pin: Pin, services: Services) -> dict[str, Any]:
    return {
        "id": pin.pin_id,
        "object": "cache.pin",
        "prompt_tokens": len(pin.prompt.prompt_token_ids),
        "pinned_tokens": pin.num_tokens,
        "pinned_blocks": len(pin.block_ids),
        "expires_in_s": round(max(0.0, pin.expires_at - services.engine.now()), 3),
    }
