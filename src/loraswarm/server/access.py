"""Lets only holders of the API key past /v1, its health paths excepted."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from loraswarm.core.events import ErrorInfo
from loraswarm.server.errors import error_response

OPEN_PATHS = frozenset({"/v1/health/live", "/v1/health/ready"})
REFUSED = ErrorInfo(
    "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
    "authentication_error",
    401,
)


class RequireApiKey:
    """ASGI middleware in front of `app`; `count` is told the status of each refusal."""

    def __init__(self, app: ASGIApp, api_key: str, count: Callable[[int], None]) -> None:
        self._app = app
        self._count = count
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        self._count(REFUSED.http_status)
        response = error_response(REFUSED, {"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        path = scope["path"]
        if not path.startswith("/v1/") or path in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
