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

from loraswarm.config import ServerConfig
from loraswarm.core.client import EngineClient
from loraswarm.server.access import RequireApiKey
from loraswarm.server.chat import create_chat_completion
from loraswarm.server.completions import create_completion
from loraswarm.server.errors import install_error_handlers
from loraswarm.server.listing import list_models, show_model
from loraswarm.server.service import Service
from loraswarm.text.tokenizer import Tokenizer


def create_app(client: EngineClient, tokenizer: Tokenizer, config: ServerConfig) -> FastAPI:
    """The application over one engine, which the caller has started and will close."""
    service = Service(client, tokenizer, int(time.time()))
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    install_error_handlers(app)
    _add_openai_routes(app, service)
    _add_health_routes(app, client)
    if config.api_key is not None:
        app.add_middleware(RequireApiKey, api_key=config.api_key)
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
