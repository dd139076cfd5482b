"""Streams over a cluster of real engines whose processes are killed: what each got, and what is
left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cluster_factory import assert_one_end, collect, empty_view, tokens_of
from engine_factory import make_engine, prompt_of, run_tokens
from loraswarm.cluster.fleet import FleetLimits
from loraswarm.cluster.front import ClusterClient, FrontOptions
from loraswarm.cluster.local_replicas import local_starter
from loraswarm.cluster.replicas import EngineReplica
from loraswarm.cluster.routing import make_router
from loraswarm.config import EngineConfig
from loraswarm.core.client import EngineStats
from loraswarm.core.request import Request, SamplingParams

LENGTHS = (1, 3, 7, 16, 17, 33, 50)


def engine_config(path: Path, **options: Any) -> EngineConfig:
    """Of a saved swarm, as `make_engine` has it."""
    defaults: dict[str, Any] = {
        "model": str(path / "model"),
        "adapters": (str(path / "adapters"),),
        "device": "cpu",
        "pool_bytes": 16 << 20,
        "host_cache_bytes": 64 << 20,
        "num_threads": 1,
        "prefix_caching": False,
        "seed": 0,
    }
    return EngineConfig.from_options(defaults | options)


@asynccontextmanager
async def local_cluster(
    config: EngineConfig, num_replicas: int, router: str = "least-loaded", **limits: float
):
    """A front over so many engine processes."""
    options = FrontOptions(num_replicas=num_replicas, seed=0, fleet=FleetLimits(**limits))
    client = ClusterClient(
        local_starter(config, lambda _: None), make_router(router), empty_view(), options
    )
    await client.open()
    try:
        yield client
    finally:
        await client.close()


def streams(num_streams: int, num_adapters: int, max_tokens: int) -> list[Request]:
    """Half of them greedy, half drawn with their own seed, one of eight for the base."""
    found = []
    for i in range(num_streams):
        adapter = None if i % 8 == 7 else f"a{i % num_adapters:03}"
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=float(i % 2),
            seed=i if i % 2 else None,
            ignore_eos=True,
            logprobs=0 if i % 3 == 0 else None,
        )
        prompt = prompt_of(i, LENGTHS[i % len(LENGTHS)])
        found.append(
            Request(request_id=f"s{i}", prompt_token_ids=prompt, params=params, adapter=adapter)
        )
    return found


def expected_tokens(path: Path, requests: list[Request]) -> dict[str, list[int]]:
    """What one engine that nothing happens to answers."""
    return run_tokens(make_engine(path, pool_bytes=32 << 20), requests)


def kill_one(client: ClusterClient) -> str:
    """Kill -9 of the engine process with the most requests; its replica's id."""
    busiest = max(client.view.replicas.values(), key=lambda replica: replica.num_requests)
    replica = client.fleet.replicas[busiest.replica_id]
    assert isinstance(replica, EngineReplica)
    assert busiest.num_requests > 0
    os.kill(replica.client.pid, signal.SIGKILL)
    return busiest.replica_id


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.02)


async def check_nothing_is_left(client: ClusterClient) -> None:
    """No replica holds a page or a pin for a request, and the front knows of none."""
    assert len(client.requests) == 0
    for replica_id, replica in client.fleet.replicas.items():
        view = client.view.replicas[replica_id]
        assert (view.num_requests, view.context_tokens, view.tokens_left) == (0, 0, 0)
        stats = await _idle_stats(replica)
        assert stats.num_frozen == 0
        assert stats.num_kv_pages == 0
        assert stats.num_pinned_adapters == 0
        num_held = stats.num_adapter_pages + stats.num_prefix_pages
        assert stats.num_free_pages + num_held == replica.info.num_pages


async def _idle_stats(replica: Any) -> EngineStats:
    """Once nothing runs there; the engine checks its pool when it is asked while idle."""
    async with asyncio.timeout(60):
        while True:
            stats: EngineStats = await replica.stats()
            if stats.num_running + stats.num_waiting == 0:
                return stats
            await asyncio.sleep(0.02)


async def run_all(client: ClusterClient, requests: list[Request]) -> asyncio.Future[list[Any]]:
    """Start all streams; a future of their events."""
    return asyncio.gather(*(collect(client, request) for request in requests))


def check_answers(
    requests: list[Request], found: list[Any], expected: dict[str, list[int]]
) -> None:
    for request, events in zip(requests, found, strict=True):
        assert_one_end(events)
        assert tokens_of(events) == expected[request.request_id], request.request_id
        if request.params.logprobs is not None:
            logprobs = [one for event in events for one in event.logprobs]
            assert [one.token_id for one in logprobs] == tokens_of(events)
