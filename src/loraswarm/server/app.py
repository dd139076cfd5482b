"""The HTTP application: which path does what.

Knows nothing about sockets or processes (serve) and nothing about the engine beyond its client.
"""

from __future__ import annotations

import time
from importlib import metadata
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response

from loraswarm.cluster.front import ClusterClient
from loraswarm.config import ServerConfig
from loraswarm.core.admin import PinAdapter, PrefetchAdapter, RescanAdapters, UnpinAdapter
from loraswarm.core.client import EngineClient
from loraswarm.server.access import RequireApiKey
from loraswarm.server.admin import administer, list_adapters, show_adapter
from loraswarm.server.chat import create_chat_completion
from loraswarm.server.completions import create_completion
from loraswarm.server.errors import install_error_handlers
from loraswarm.server.listing import list_models, show_model
from loraswarm.server.lora_endpoints import load_lora_adapter, unload_lora_adapter
from loraswarm.server.metrics import RequestMetrics
from loraswarm.server.replicas import add_replicas, list_replicas, remove_replica
from loraswarm.server.scrape import Scraper
from loraswarm.server.service import Service
from loraswarm.text.tokenizer import Tokenizer


def create_app(client: EngineClient, tokenizer: Tokenizer, config: ServerConfig) -> FastAPI:
    """The application over one engine, which the caller has started and will close."""
    metrics = RequestMetrics(client.info.model)
    service = Service(client, tokenizer, int(time.time()), metrics)
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    install_error_handlers(app, metrics.count_error)
    _add_openai_routes(app, service)
    _add_adapter_routes(app, service)
    _add_health_routes(app, client)
    if isinstance(client, ClusterClient):
        _add_replica_routes(app, client)
    _add_metrics_route(app, Scraper(client, metrics))
    if config.api_key is not None:
        app.add_middleware(RequireApiKey, api_key=config.api_key, count=metrics.count_error)
    return app


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return list_models(service)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return show_model(service, name)


def _add_adapter_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        return await load_lora_adapter(service, request)

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        return await unload_lora_adapter(service, request)

    @app.get("/v1/adapters")
    async def adapters(request: Request) -> Response:
        return await list_adapters(service, request)

    @app.get("/v1/adapters/{name:path}")
    async def adapter(name: str) -> Response:
        return await show_adapter(service, name)

    @app.post("/v1/adapters/rescan")
    async def rescan(request: Request) -> Response:
        return await administer(service, request, RescanAdapters())

    @app.post("/v1/adapters/{name:path}/pin")
    async def pin(name: str, request: Request) -> Response:
        return await administer(service, request, PinAdapter(name))

    @app.post("/v1/adapters/{name:path}/unpin")
    async def unpin(name: str, request: Request) -> Response:
        return await administer(service, request, UnpinAdapter(name))

    @app.post("/v1/adapters/{name:path}/prefetch")
    async def prefetch(name: str, request: Request) -> Response:
        return await administer(service, request, PrefetchAdapter(name))


def _add_replica_routes(app: FastAPI, client: ClusterClient) -> None:
    @app.get("/v1/replicas")
    async def replicas() -> Response:
        return list_replicas(client)

    @app.post("/v1/replicas")
    async def add(request: Request) -> Response:
        return await add_replicas(client, request)

    @app.delete("/v1/replicas/{replica_id}")
    async def remove(replica_id: str, request: Request) -> Response:
        return await remove_replica(client, replica_id, request)


def _add_metrics_route(app: FastAPI, scraper: Scraper) -> None:
    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return await scraper.answer(request)


def _add_health_routes(app: FastAPI, client: EngineClient) -> None:
    @app.get("/health")
    @app.get("/v1/health/ready")
    async def ready() -> Response:
        if client.is_alive:
            return _status(200, {"object": "health", "status": "ready"})
        return _status(503, {"object": "health", "status": "the engine is gone"})

    @app.get("/v1/health/live")
    async def live() -> Response:
        return _status(200, {"object": "health", "status": "live"})

    @app.get("/version")
    async def version() -> Response:
        return _status(200, {"object": "version", "version": metadata.version("loraswarm")})


def _status(code: int, body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), code, media_type="application/json")
