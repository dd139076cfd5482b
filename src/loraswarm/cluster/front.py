"""The cluster as one engine: what the server talks to when there are several replicas.

Implements core.client.EngineClient over a Fleet. Joins the parts that do the work: streams,
administration, moving. Knows no transport; which replica gets a request is the Router's decision.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from loraswarm.cluster.administration import Administration
from loraswarm.cluster.admission import Admission
from loraswarm.cluster.fleet import Fleet, FleetLimits
from loraswarm.cluster.merged import (
    NOTHING,
    MergedAdapters,
    merge_catalogs,
    merge_stats,
    only_totals,
)
from loraswarm.cluster.moving import MoveFailed, Mover
from loraswarm.cluster.open_requests import OpenRequests
from loraswarm.cluster.placement.forecast import LoadForecast
from loraswarm.cluster.prefixes import PrefixIndex
from loraswarm.cluster.replicas import Replica, StartReplica
from loraswarm.cluster.residency import ResidencyBook
from loraswarm.cluster.routing import Router
from loraswarm.cluster.streams import Streams
from loraswarm.cluster.view import ClusterView, RoutedRequest
from loraswarm.core.admin import AdapterState, AdminCommand, AdminResult
from loraswarm.core.client import AdapterSummary, EngineInfo, EngineStats
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request
from loraswarm.core.residency_report import ResidencyReport
from loraswarm.errors import EngineError, LoRASwarmError

STATS_WAIT_S = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontOptions:
    """`wait_s` is how long requests wait while no replica serves; `seed` makes those without a
    seed repeatable. `is_one_machine`: all replicas read the same files of adapters, so that those
    with another digest have other contents."""

    num_replicas: int = 1
    is_one_machine: bool = True
    seed: int | None = None
    wait_s: float = 60.0
    fleet: FleetLimits = field(default_factory=FleetLimits)


class ClusterClient:
    """Several replicas of one base model behind the interface of one."""

    def __init__(
        self, start: StartReplica, router: Router, view: ClusterView, options: FrontOptions
    ) -> None:
        """Within an event loop. `view` is kept true from here on; its costs and the adapters' bytes
        are the caller's."""
        self.view = view
        self.fleet = Fleet(start, view, self, options.fleet)
        self.requests = OpenRequests(view, random.Random(options.seed))
        self.mover = Mover(self.fleet, self.requests)
        self._router = router
        self._options = options
        self._administration = Administration(self.fleet.replicas)
        self._adapters = MergedAdapters(self.fleet.replicas)
        admission = Admission(self.fleet, self.requests, view, self._choose, options.wait_s)
        self._streams = Streams(self.fleet, self.requests, admission, view, options.is_one_machine)
        self._last_stats: dict[str, EngineStats] = {}
        self._past = NOTHING
        self._info: EngineInfo | None = None
        self._prefixes: PrefixIndex | None = None
        self._residency: ResidencyBook | None = None
        self.forecast = LoadForecast(now_s=asyncio.get_running_loop().time())

    async def open(self) -> None:
        """Start the replicas and wait until all serve. Raises ConfigError or EngineError."""
        await self.fleet.open(self._options.num_replicas)

    @property
    def info(self) -> EngineInfo:
        """As of any replica, for all have the same base and options; memory is that of all."""
        assert self._info is not None, "not opened yet"
        return self._info

    @property
    def is_alive(self) -> bool:
        """Whether any replica serves; while none does, requests wait."""
        return not self.fleet.is_closed and self.fleet.num_serving > 0

    @property
    def adapters(self) -> Mapping[str, AdapterSummary]:
        """See `EngineClient`: what any replica serves is served."""
        return self._adapters

    async def generate(self, request: Request) -> AsyncGenerator[SequenceEvent, None]:
        """See `EngineClient`. The events are the same whichever replicas compute them."""
        held = self.requests.open(request)
        routed = self.requests.routed(held)
        self.forecast.saw(routed.adapters, routed.prompt_tokens, routed.expected_tokens)
        try:
            async with aclosing(self._streams.run(held)) as events:
                async for event in events:
                    yield event
        finally:
            self.requests.close(held)
            self.fleet.news.tell()

    async def stats(self) -> EngineStats:
        """Of all replicas together; totals include those that are gone or do not answer in time.

        Raises   EngineError if none answers.
        """
        replicas = tuple(self.fleet.replicas.values())
        answers = await asyncio.gather(*map(self._stats_of, replicas))
        fresh = [one for one in answers if one is not None]
        if not fresh:
            raise EngineError("no replica is alive")
        silent = [r.replica_id for r, one in zip(replicas, answers, strict=True) if one is None]
        fresh += [only_totals(self._last_stats[r]) for r in silent if r in self._last_stats]
        for replica_id in self._last_stats.keys() - self.fleet.replicas.keys():
            gone = only_totals(self._last_stats.pop(replica_id))
            self._past = merge_stats([self._past, gone])
        return merge_stats([self._past, *fresh])

    async def _stats_of(self, replica: Replica) -> EngineStats | None:
        """None if it does not answer: a replica that hangs must not hide the others."""
        try:
            async with asyncio.timeout(STATS_WAIT_S):
                found = await replica.stats()
        except (LoRASwarmError, TimeoutError):
            return None
        self._last_stats[replica.replica_id] = found
        return found

    async def adapter_states(self) -> tuple[AdapterState, ...]:
        """See `EngineClient`; one that replicas have in different states says so.

        Raises   EngineError if no replica is alive.
        """
        replicas = tuple(self.fleet.replicas.values())
        found = await asyncio.gather(
            *(r.adapter_states() for r in replicas), return_exceptions=True
        )
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, LoRASwarmError):
                raise one
        states = [one for one in found if not isinstance(one, BaseException)]
        if not states:
            raise EngineError("no replica is alive")
        return merge_catalogs(states)

    async def administer(self, command: AdminCommand) -> AdminResult:
        """See `EngineClient`; carried out by every replica, or an error that names who failed."""
        return await self._administration.administer(command)

    async def wait_closed(self) -> None:
        await self.fleet.wait_closed()

    async def close(self) -> None:
        await self.fleet.close()

    def note_arrival(self, replica: Replica) -> None:
        """See fleet.Upkeep."""
        if self._residency is None:
            self._prefixes = PrefixIndex(replica.info.page_tokens)
            self._residency = ResidencyBook(self.view, self._prefixes)
        replica.watch_residency(partial(self._take_report, replica))
        self._sum_up()

    def note_departure(self, replica_id: str) -> None:
        """See fleet.Upkeep."""
        if self._residency is not None:
            self._residency.forget(replica_id)
        self._sum_up()

    def _take_report(self, replica: Replica, report: ResidencyReport) -> None:
        assert self._residency is not None
        self.view.now_s = asyncio.get_running_loop().time()
        if self._residency.apply(replica.replica_id, report) == "ask" and replica.is_alive:
            replica.watch_residency(partial(self._take_report, replica))

    def _sum_up(self) -> None:
        found = [replica.info for replica in self.fleet.replicas.values()]
        if found:
            self._info = dataclasses.replace(
                found[0],
                num_pages=sum(info.num_pages for info in found),
                host_cache_bytes=sum(info.host_cache_bytes for info in found),
            )

    def is_busy(self, replica_id: str) -> bool:
        """See fleet.Upkeep."""
        replica = self.view.replicas.get(replica_id)
        return replica is not None and replica.num_requests > 0

    async def prepare(self, replica: Replica) -> None:
        """See fleet.Upkeep."""
        await self._administration.prepare(replica)

    def _choose(self, request: Request) -> Callable[[RoutedRequest, ClusterView], str | None]:
        """The router's decision for one request, whose prompt may be cached somewhere."""
        if self._prefixes is None:
            return self._router.route
        prefix = self._prefixes.find_for(request, self._adapters)
        return partial(self._router.route, prefix=prefix)

    async def evacuate(self, replica_id: str) -> None:
        """See fleet.Upkeep. What cannot be moved ends there."""
        for held in self.requests.on_replica(replica_id):
            target = self._router.route(self.requests.routed(held), self.view)
            if target is None:
                return
            try:
                await self.mover.move(held.request_id, target, with_kv=True)
            except MoveFailed as error:
                log.info("replica=%s %s", replica_id, error)
