"""GET /v1/models: the base model and its adapters, as clients of OpenAI list models."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi.responses import Response

from loraswarm.core.client import AdapterSummary, EngineInfo, served_names
from loraswarm.errors import UnknownAdapter
from loraswarm.server.service import Service


def list_models(service: Service) -> Response:
    """Everything that `model` may say, the base model first."""
    return _json({"object": "list", "data": _entries(service)})


def show_model(service: Service, name: str) -> Response:
    """One entry of the list. Raises UnknownAdapter."""
    info = service.client.info
    if name == info.model:
        return _json(_entry(service, info, name, None))
    adapter = service.client.adapters.get(name)
    if adapter is None or adapter.refusal is not None:
        raise UnknownAdapter(name, service.model_names())
    return _json(_entry(service, info, name, adapter))


def _entries(service: Service) -> list[dict[str, Any]]:
    info = service.client.info
    adapters = service.client.adapters
    served = [_entry(service, info, name, adapters[name]) for name in served_names(adapters)]
    return [_entry(service, info, info.model, None), *served]


def _entry(
    service: Service, info: EngineInfo, name: str, adapter: AdapterSummary | None
) -> dict[str, Any]:
    """An adapter, or the base model."""
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "loraswarm",
        "root": info.model_path if adapter is None else adapter.path,
        "parent": None if adapter is None else info.model,
        "max_model_len": info.max_model_len,
    }


def _json(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
