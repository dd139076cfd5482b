"""/v1/adapters: where each adapter is, and an operator's commands about one.

Rows are core.admin.AdapterState as it is. Knows nothing of vLLM's forms (lora_endpoints).
"""

from __future__ import annotations

import msgspec
from fastapi import Request
from fastapi.responses import Response

from loraswarm.core.admin import AdminCommand
from loraswarm.errors import InvalidRequest, UnknownAdapter
from loraswarm.server.schema import StrictBody, parse_body, read_bytes
from loraswarm.server.service import Service
from loraswarm.server.streaming import unless_disconnected


class NoFields(StrictBody):
    """A body that says nothing."""


async def list_adapters(service: Service, request: Request) -> Response:
    """Every adapter of the catalog, or those of `?name=`, which may be given several times.

    Raises   UnknownAdapter for a name that is not in the catalog; InvalidRequest for any other
             parameter.
    """
    for parameter in request.query_params:
        if parameter != "name":
            raise InvalidRequest(f"unknown parameter {parameter!r}; 'name' is known", parameter)
    rows = await service.client.adapter_states()
    names = request.query_params.getlist("name")
    if not names:
        return _json({"object": "list", "data": rows})
    by_name = {row.name: row for row in rows}
    for name in names:
        if name not in by_name:
            raise UnknownAdapter(name, by_name)
    return _json({"object": "list", "data": [by_name[name] for name in dict.fromkeys(names)]})


async def show_adapter(service: Service, name: str) -> Response:
    """One row. Raises UnknownAdapter."""
    rows = await service.client.adapter_states()
    for row in rows:
        if row.name == name:
            return _json(row)
    raise UnknownAdapter(name, [row.name for row in rows])


async def administer(service: Service, request: Request, command: AdminCommand) -> Response:
    """What the engine answers to `command` when it has carried it out: the adapter's row, or what a
    scan has found. The engine goes on with it if the client does not wait that long.
    """
    raw = await read_bytes(request)
    if raw.strip():
        parse_body(raw, NoFields)
    work = service.client.administer(command)
    return _json(await unless_disconnected(request.receive, work))


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
