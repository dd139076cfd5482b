"""Clusters for tests: over fake replicas in virtual time, or over engines in child processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from cost_cases import figures
from fake_replica import POISON, FakeReplica
from loraswarm.cluster.fleet import FleetLimits
from loraswarm.cluster.front import ClusterClient, FrontOptions
from loraswarm.cluster.routing import make_router
from loraswarm.cluster.view import ClusterView
from loraswarm.core.client import AdapterSummary
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request, SamplingParams

SEEDED = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
ADAPTERS = ("a", "b")


@dataclass
class Starter:
    """Makes fake replicas; `started` are all there ever were. A start fails while `failures` are
    left; `change` is told of each before it serves."""

    options: dict[str, Any] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    start_s: float = 0.0
    is_one_machine: bool = True
    change: Callable[[FakeReplica], None] = lambda _: None
    started: list[FakeReplica] = field(default_factory=list)

    async def __call__(self, replica_id: str) -> FakeReplica:
        await asyncio.sleep(self.start_s)
        if self.failures:
            raise self.failures.pop(0)
        adapters = {
            name: AdapterSummary(name=name, path=f"/{name}", digest=f"d-{name}")
            for name in (*ADAPTERS, POISON)
        }
        replica = FakeReplica(replica_id, adapters, **self.options)
        self.change(replica)
        self.started.append(replica)
        return replica

    def alive(self) -> list[FakeReplica]:
        return [replica for replica in self.started if replica.is_alive]


def empty_view() -> ClusterView:
    return ClusterView(figures(), {})


@asynccontextmanager
async def cluster(
    starter: Starter, num_replicas: int = 3, wait_s: float = 60.0, **limits: float
) -> AsyncIterator[ClusterClient]:
    """A front over fakes, closed at the end; then nothing may be left of any request."""
    options = FrontOptions(
        num_replicas=num_replicas,
        is_one_machine=starter.is_one_machine,
        seed=0,
        wait_s=wait_s,
        fleet=FleetLimits(**limits),
    )
    client = ClusterClient(starter, make_router("least-loaded"), empty_view(), options)
    await client.open()
    try:
        yield client
        assert_nothing_is_left(client, starter)
    finally:
        await client.close()


def assert_nothing_is_left(client: ClusterClient, starter: Starter) -> None:
    assert len(client.requests) == 0
    assert [replica.running for replica in starter.started if replica.running] == []
    for replica in client.view.replicas.values():
        assert replica.requests == {}
        assert (replica.context_tokens, replica.prefill_tokens, replica.tokens_left) == (0, 0, 0)


def request(
    request_id: str = "x", adapter: str | None = "a", params: SamplingParams = SEEDED
) -> Request:
    return Request(
        request_id=request_id, prompt_token_ids=(1, 2, 3), params=params, adapter=adapter
    )


async def collect(client: Any, one: Request) -> list[SequenceEvent]:
    return [event async for event in client.generate(one)]


def tokens_of(events: Iterable[SequenceEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def assert_one_end(events: list[SequenceEvent], reason: str = "length") -> None:
    reasons = [event.finish_reason for event in events]
    assert reasons == [None] * (len(events) - 1) + [reason], reasons


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
