"""Replicas in child processes of this one, on this machine: for tests, and for one machine without
Ray. Called by the command `serve` and by tests."""

from __future__ import annotations

from collections.abc import Callable

from loraswarm.cluster.replicas import EngineReplica, Replica, StartReplica
from loraswarm.config import EngineConfig
from loraswarm.engine.child_client import ChildEngineClient


def local_starter(config: EngineConfig, report: Callable[[str], None]) -> StartReplica:
    """Starts engine processes; `report` gets each line about a start, with the replica's id."""

    async def start(replica_id: str) -> Replica:
        client = await ChildEngineClient.start(config, lambda line: report(f"{replica_id}: {line}"))
        return EngineReplica(replica_id, client, config)

    return start
