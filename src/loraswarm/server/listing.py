"""GET /v1/models: the base model and its adapters, as clients of OpenAI list models."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi.responses import Response

from loraswarm.errors import UnknownAdapter
from loraswarm.server.service import Service


def list_models(service: Service) -> Response:
    """Everything that `model` may say, the base model first."""
    return _json({"object": "list", "data": _entries(service)})


def show_model(service: Service, name: str) -> Response:
    """One entry of the list. Raises UnknownAdapter."""
    for entry in _entries(service):
        if entry["id"] == name:
            return _json(entry)
    raise UnknownAdapter(name, service.model_names())


def _entries(service: Service) -> list[dict[str, Any]]:
    info = service.client.info
    served = [adapter for adapter in info.adapters if adapter.refusal is None]
    places: list[tuple[str, str, str | None]] = [(info.model, info.model_path, None)]
    places += [(adapter.name, adapter.path, info.model) for adapter in served]
    return [
        {
            "id": name,
            "object": "model",
            "created": service.created_s,
            "owned_by": "loraswarm",
            "root": root,
            "parent": parent,
            "max_model_len": info.max_model_len,
        }
        for name, root, parent in places
    ]


def _json(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
