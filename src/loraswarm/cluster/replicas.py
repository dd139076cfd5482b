"""What the front asks of a replica, and a replica made of an engine's client.

A replica is an engine that others like it can take requests over from. Knows nothing about routing
or what is open where. Implemented here over any `ChildEngineClient`, in tests by a fake.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from loraswarm.cluster.view import ReplicaLimits
from loraswarm.config import EngineConfig
from loraswarm.core.client import EngineClient, EngineInfo
from loraswarm.core.events import SequenceEvent
from loraswarm.core.snapshot import SequenceSnapshot


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

    def kill(self) -> None:
        """End it at once; its streams end as after any death."""
        ...


StartReplica = Callable[[str], Awaitable[Replica]]
"""Starts the replica of that id and waits until it serves; ConfigError or EngineError if not."""


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
