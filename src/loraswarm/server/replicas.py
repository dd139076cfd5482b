"""/v1/replicas: which engines serve, and an operator's adding and removing of them.

Only where a cluster is served. Knows the front's fleet; nothing of what replicas are.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response

from loraswarm.cluster.front import ClusterClient
from loraswarm.server.schema import StrictBody, read_body
from loraswarm.server.streaming import unless_disconnected


class AddBody(StrictBody):
    """How many replicas more."""

    count: int = 1


def list_replicas(client: ClusterClient) -> Response:
    """One row a replica, and how many are being started."""
    rows = [_row(client, replica_id) for replica_id in client.fleet.replicas]
    starting = client.fleet.num_starting
    return _json({"object": "list", "data": rows, "num_starting": starting})


async def add_replicas(client: ClusterClient, request: Request) -> Response:
    """Begin to start more; answered at once, as a start takes a while."""
    body = await read_body(request, AddBody)
    client.fleet.add(body.count)
    return list_replicas(client)


async def remove_replica(client: ClusterClient, replica_id: str, request: Request) -> Response:
    """Drain one and end it; answered when it is gone. It goes on if the client does not wait.

    Raises   InvalidRequest if there is no such replica, or no other.
    """
    await unless_disconnected(request.receive, client.fleet.remove(replica_id))
    return list_replicas(client)


def _row(client: ClusterClient, replica_id: str) -> dict[str, Any]:
    view = client.view.replicas[replica_id]
    is_leaving = replica_id in client.fleet.leaving
    state = "draining" if is_leaving else "serving" if view.accepts else "lost"
    tiers = list(view.tiers.values())
    return {
        "replica": replica_id,
        "state": state,
        "num_requests": view.num_requests,
        "num_context_tokens": view.context_tokens,
        "num_device_adapters": tiers.count("device"),
        "num_host_adapters": tiers.count("host"),
        "num_pages": view.limits.num_pages,
    }


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
