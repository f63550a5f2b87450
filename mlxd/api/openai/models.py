"""GET /v1/models and /v1/models/{id}.

It does not know what is behind the names.
"""

from __future__ import annotations

from typing import Any

from mlxd.api.http import HTTPRequest
from mlxd.api.served_model import ServedModel
from mlxd.api.services import Services


async def list_models(request: HTTPRequest, services: Services) -> None:
    """Every name under which the model is served."""
    model = services.model
    await request.respond_json(
        200, {"object": "list", "data": [_describe(model, name) for name in model.names]}
    )


async def get_model(request: HTTPRequest, services: Services) -> None:
    """One of them, or `default`; 404 for any other."""
    model = services.model
    model.check_name(request.path_param)
    name = request.path_param if request.path_param in model.names else model.name
    await request.respond_json(200, _describe(model, name))


def _describe(model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        "root": model.root,
        "parent": None,
        "permission": [],
        "max_model_len": model.max_model_len,
    }
