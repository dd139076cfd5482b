"""What the front asks of a replica, and a replica made of an engine's client.

A replica is an engine that others like it can take requests over from. Knows nothing about routing
or what is open where. Implemented here over any `ChildEngineClient`, in tests by a fake.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Protocol

from loraswarm.cluster.view import ReplicaLimits
from loraswarm.config import EngineConfig
from loraswarm.core.admin import AdapterState, AdminCommand, AdminResult
from loraswarm.core.client import AdapterSummary, EngineClient, EngineInfo, EngineStats
from loraswarm.core.events import ReportedError, SequenceEvent
from loraswarm.core.request import Request
from loraswarm.core.residency_report import ResidencyReport
from loraswarm.core.snapshot import SequenceSnapshot
from loraswarm.engine.child_client import ChildEngineClient
from loraswarm.errors import EngineError, InvalidRequest


class Replica(EngineClient, Protocol):
    """An engine of a cluster. Whatever it is asked for once it is gone raises EngineError."""

    @property
    def replica_id(self) -> str: ...

    @property
    def limits(self) -> ReplicaLimits: ...

    async def freeze(self, request_id: str, with_kv: bool) -> SequenceSnapshot:
        """Stop planning the request but keep its pages; all its events so far come before.

        Raises   InvalidRequest if it is not open there, or has ended meanwhile.
        """
        ...

    async def thaw(self, request_id: str) -> None:
        """Go on with it; nothing happens if it is not frozen."""
        ...

    async def release(self, request_id: str) -> None:
        """Forget it: it runs elsewhere. Its stream ends, without an event or with an abort."""
        ...

    async def adopt(self, snapshot: SequenceSnapshot) -> AsyncGenerator[SequenceEvent, None]:
        """Go on with a request of another replica; the events are of tokens after the snapshot's.

        Returns when the replica has taken it. Closing the generator aborts the request; so does
        a caller that stops waiting.
        Raises   what `generate` reports as an error: the snapshot is not taken.
        """
        ...

    def watch_residency(self, on_report: Callable[[ResidencyReport], None]) -> None:
        """Hand `on_report` what it holds, a full report first; asked again, another full one."""
        ...

    def kill(self) -> None:
        """End it at once; its streams end as after any death."""
        ...


StartReplica = Callable[[str], Awaitable[Replica]]
"""Starts the replica of that id and waits until it serves; ConfigError or EngineError if not."""


class EngineReplica:
    """A replica over the client of one engine process, wherever that runs."""

    def __init__(self, replica_id: str, client: ChildEngineClient, config: EngineConfig) -> None:
        """`client` is started, with `config`; it is closed with this."""
        self._id = replica_id
        self._client = client
        self._limits = limits_of(client.info, config)

    @property
    def replica_id(self) -> str:
        return self._id

    @property
    def limits(self) -> ReplicaLimits:
        return self._limits

    @property
    def client(self) -> ChildEngineClient:
        return self._client

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    @property
    def is_alive(self) -> bool:
        return self._client.is_alive

    @property
    def adapters(self) -> Mapping[str, AdapterSummary]:
        """See `EngineClient`."""
        return self._client.adapters

    def generate(self, request: Request) -> AsyncGenerator[SequenceEvent, None]:
        """See `EngineClient`."""
        return self._client.generate(request)

    async def adopt(self, snapshot: SequenceSnapshot) -> AsyncGenerator[SequenceEvent, None]:
        """See `Replica`."""
        stream = self._client.adopt(snapshot)
        first = await anext(stream)
        if first.finish_reason is None:
            return stream
        await stream.aclose()
        if first.error is None:
            raise EngineError(f"replica {self._id} is being stopped")
        raise ReportedError(first.error)

    async def freeze(self, request_id: str, with_kv: bool) -> SequenceSnapshot:
        """See `Replica`."""
        snapshot = await self._client.freeze(request_id, with_kv)
        if snapshot is None:
            raise InvalidRequest(f"request {request_id!r} is not open on replica {self._id}")
        return snapshot

    async def thaw(self, request_id: str) -> None:
        """See `Replica`."""
        await self._client.thaw(request_id)

    async def release(self, request_id: str) -> None:
        """See `Replica`."""
        await self._client.release(request_id)

    async def stats(self) -> EngineStats:
        """See `EngineClient`."""
        return await self._client.stats()

    async def adapter_states(self) -> tuple[AdapterState, ...]:
        """See `EngineClient`."""
        return await self._client.adapter_states()

    async def administer(self, command: AdminCommand) -> AdminResult:
        """See `EngineClient`."""
        return await self._client.administer(command)

    async def wait_closed(self) -> None:
        await self._client.wait_closed()

    async def close(self) -> None:
        await self._client.close()

    def watch_residency(self, on_report: Callable[[ResidencyReport], None]) -> None:
        """See `Replica`."""
        self._client.watch_residency(on_report)

    def kill(self) -> None:
        """See `Replica`."""
        self._client.kill()


def contents_of(replica: Replica, request: Request) -> tuple[str, ...] | None:
    """What it serves by the names of the request's adapters; None before all are known."""
    known = replica.adapters
    names = [name for name, _ in request.weighted_adapters]
    digests = tuple(known[name].digest if name in known else "" for name in names)
    return digests if all(digests) else None


def limits_of(info: EngineInfo, config: EngineConfig) -> ReplicaLimits:
    """What an engine with these options can hold."""
    return ReplicaLimits(
        num_seats=config.max_num_sequences,
        max_step_tokens=config.max_step_tokens,
        num_pages=info.num_pages,
        page_tokens=info.page_tokens,
        page_bytes=info.page_bytes,
        host_bytes=info.host_cache_bytes,
    )
