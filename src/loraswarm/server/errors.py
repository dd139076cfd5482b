"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}.

The one place where exceptions become HTTP responses. Used by app, streaming and the endpoints.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from loraswarm.core.events import ErrorInfo
from loraswarm.errors import EngineError, LoRASwarmError, UnknownAdapter

Handler = Callable[[Request, Exception], Awaitable[Response]]
CLIENT_CLOSED_REQUEST = 499
CODE_OF_TYPE = {
    UnknownAdapter.error_type: "model_not_found",
    "authentication_error": "invalid_api_key",
}
RETRY_STATUSES = (429, 503)
UNFINISHED = ErrorInfo(
    "the engine ended this request before it was complete; send it again",
    EngineError.error_type,
    503,
)


def error_body(info: ErrorInfo) -> bytes:
    """The JSON of one error."""
    code = CODE_OF_TYPE.get(info.error_type)
    return msgspec.json.encode(
        {
            "error": {
                "message": info.message,
                "type": info.error_type,
                "param": info.param,
                "code": code,
            }
        }
    )


def error_response(info: ErrorInfo, headers: Mapping[str, str] | None = None) -> Response:
    """A whole response for one error."""
    return Response(error_body(info), info.http_status, headers, "application/json")


def retry_headers(error: LoRASwarmError) -> dict[str, str] | None:
    """Retry-After where trying again can help."""
    if error.http_status not in RETRY_STATUSES:
        return None
    return {"Retry-After": str(getattr(error, "retry_after_s", 1))}


def install_error_handlers(app: FastAPI, count: Callable[[int], None]) -> None:
    """Every failure of `app` answers in OpenAI's shape, unknown paths and our bugs included.

    `count` is told the status of each.
    """

    def counted(handler: Handler) -> Handler:
        async def answer(request: Request, error: Exception) -> Response:
            response = await handler(request, error)
            count(response.status_code)
            return response

        return answer

    app.add_exception_handler(LoRASwarmError, counted(_on_known_error))
    app.add_exception_handler(HTTPException, counted(_on_http_error))
    app.add_exception_handler(ClientDisconnect, counted(_on_disconnect))
    app.add_exception_handler(Exception, counted(_on_bug))


async def _on_known_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LoRASwarmError)
    return error_response(ErrorInfo.of(error), retry_headers(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    info = ErrorInfo(message, "invalid_request_error", error.status_code)
    return error_response(info, error.headers)


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_bug(_: Request, error: Exception) -> Response:
    message = f"internal error ({type(error).__name__}); the server's log has the details"
    return error_response(ErrorInfo(message, LoRASwarmError.error_type, 500))
