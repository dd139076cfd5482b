"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}.

The one place where exceptions become HTTP responses. Used by app, streaming and the endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from loraswarm.core.events import ErrorInfo
from loraswarm.errors import EngineError, LoRASwarmError, UnknownAdapter

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


class ReportedError(LoRASwarmError):
    """An error that came from the engine as data."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info


def error_info(error: LoRASwarmError) -> ErrorInfo:
    """`error` as plain data."""
    if isinstance(error, ReportedError):
        return error.info
    param = getattr(error, "param", None)
    return ErrorInfo(str(error), error.error_type, error.http_status, param)


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


def install_error_handlers(app: FastAPI) -> None:
    """Every failure of `app` answers in OpenAI's shape, unknown paths and our bugs included."""
    app.add_exception_handler(LoRASwarmError, _on_known_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


async def _on_known_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LoRASwarmError)
    info = error_info(error)
    if info.http_status not in RETRY_STATUSES:
        return error_response(info)
    retry_after_s = getattr(error, "retry_after_s", 1)
    return error_response(info, {"Retry-After": str(retry_after_s)})


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
