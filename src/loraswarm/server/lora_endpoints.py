"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter in vLLM's bodies, texts and errors.

Controllers of Kubernetes read these: one takes a 400 that says "already" for success, another looks
at the status only. Our own form of the same commands' state is /v1/adapters (admin).
"""

from __future__ import annotations

import msgspec
from fastapi import Request
from fastapi.responses import PlainTextResponse, Response

from loraswarm.core.admin import AdminCommand, LoadAdapter, UnloadAdapter
from loraswarm.core.client import EngineInfo
from loraswarm.core.events import ErrorInfo
from loraswarm.errors import InvalidRequest, LoRASwarmError
from loraswarm.server.errors import retry_headers
from loraswarm.server.schema import StrictBody, read_body
from loraswarm.server.service import Service
from loraswarm.server.streaming import unless_disconnected

TYPE_OF_STATUS = {
    400: "InvalidUserInput",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    503: "ServiceUnavailableError",
}
OTHER_TYPE = "InternalServerError"
MAX_SHOWN_PATH = 200


class LoadBody(StrictBody):
    """What vLLM takes, and what its controllers send besides."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    base_model_name: str = ""
    is_3d_lora_weight: bool = False


class UnloadBody(StrictBody):
    """`lora_int_id` is vLLM's own number of an adapter; it has no meaning in either server."""

    lora_name: str = ""
    lora_int_id: int | None = None


async def load_lora_adapter(service: Service, request: Request) -> Response:
    """Serve what is at a path as a name; answered when it is in host memory."""
    body = LoadBody()
    try:
        body = await read_body(request, LoadBody)
        _check(body, service.client.info)
        command = LoadAdapter(body.lora_name, body.lora_path, body.load_inplace)
        await _administer(service, request, command)
    except LoRASwarmError as error:
        missing = f"No adapter found for {body.lora_path[:MAX_SHOWN_PATH]} ({error})"
        is_missing = error.http_status == 404
        message = f"Loading lora {body.lora_name} failed: {missing}" if is_missing else str(error)
        return _error(service, error, message)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_lora_adapter(service: Service, request: Request) -> Response:
    """Serve a name no more; answered when its requests have ended and its memory is free.

    The engine goes on with it if the client does not wait that long.
    """
    body = UnloadBody()
    try:
        body = await read_body(request, UnloadBody)
        if not body.lora_name:
            raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.")
        await _administer(service, request, UnloadAdapter(body.lora_name))
    except LoRASwarmError as error:
        is_unknown = error.http_status == 404
        unknown = f"The lora adapter '{body.lora_name}' cannot be found."
        return _error(service, error, unknown if is_unknown else str(error))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check(body: LoadBody, info: EngineInfo) -> None:
    if not body.lora_name or not body.lora_path:
        raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
    if body.is_3d_lora_weight:
        raise InvalidRequest(
            "is_3d_lora_weight is true; adapters of fused expert weights are not supported",
            "is_3d_lora_weight",
        )
    base = body.base_model_name
    if base and base not in (info.model, info.model_path) and base.split("/")[-1] != info.model:
        raise InvalidRequest(
            f"base_model_name is {base!r}; this server's base model is {info.model!r}",
            "base_model_name",
        )


async def _administer(service: Service, request: Request, command: AdminCommand) -> None:
    await unless_disconnected(request.receive, service.client.administer(command))


def _error(service: Service, error: LoRASwarmError, message: str) -> Response:
    """An error as vLLM writes it: its own type strings, and the status again as the code."""
    info = ErrorInfo.of(error)
    service.metrics.count_error(info.http_status)
    body = {
        "message": message,
        "type": TYPE_OF_STATUS.get(info.http_status, OTHER_TYPE),
        "param": info.param,
        "code": info.http_status,
    }
    return Response(
        msgspec.json.encode({"error": body}),
        info.http_status,
        retry_headers(error),
        "application/json",
    )
