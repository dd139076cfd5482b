"""Which replica a request goes to next, and the line of those that must wait for one.

Asks a router; knows when to ask again. First come, first served: while the head of the line finds
no replica, those behind it do not either. Used by the front's streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from loraswarm.cluster.fleet import Fleet
from loraswarm.cluster.open_requests import OpenRequest, OpenRequests
from loraswarm.cluster.replicas import Replica, contents_of
from loraswarm.cluster.view import ClusterView, ReplicaView, RoutedRequest
from loraswarm.core.request import Request
from loraswarm.errors import EngineError, Overloaded

Choose = Callable[[Request], Callable[[RoutedRequest, ClusterView], str | None]]
"""A router's decision for one request, whose prompt may be looked up first: the replica that should
have it, one that accepts; None to let it wait."""


class Admission:
    """Gives each request that has no replica one."""

    def __init__(
        self, fleet: Fleet, requests: OpenRequests, view: ClusterView, choose: Choose, wait_s: float
    ) -> None:
        """`wait_s` is how long requests wait while no replica serves at all."""
        self._fleet = fleet
        self._requests = requests
        self._view = view
        self._choose = choose
        self._wait_s = wait_s
        self._line = asyncio.Lock()

    async def place(self, held: OpenRequest) -> Replica:
        """The replica that has it from now on.

        Raises   Overloaded if none came to serve in time, EngineError if the cluster has ended.
        """
        since_s = asyncio.get_running_loop().time()
        async with self._line:
            while (replica := self._try_place(held)) is None:
                if self._fleet.is_closed:
                    raise self._fleet.failure or EngineError("the cluster was closed")
                if self._fleet.num_serving:
                    since_s = asyncio.get_running_loop().time()
                left_s = since_s + self._wait_s - asyncio.get_running_loop().time()
                if left_s <= 0:
                    raise Overloaded(f"no replica has served for {self._wait_s:g} s; try later")
                await self._fleet.news.wait(None if self._fleet.num_serving else left_s)
            return replica

    def _try_place(self, held: OpenRequest) -> Replica | None:
        if self._fleet.is_closed:
            return None
        routed = self._requests.routed(held)
        self._view.now_s = asyncio.get_running_loop().time()
        route = self._choose(held.request)
        while (replica_id := route(routed, self._view)) is not None:
            replica = self._suited(held, replica_id)
            if replica.is_alive:
                self._requests.place(held, routed, replica.replica_id)
                return replica
            self._fleet.note_death(replica.replica_id)
        return None

    def _suited(self, held: OpenRequest, replica_id: str) -> Replica:
        """That replica, unless others suit better, by `_suits`: then the least loaded one of those
        that do best. A load that is under way has not reached all yet."""
        chosen = self._fleet.replicas[replica_id]
        suits = _suits(chosen, held)
        if all(suits):
            return chosen
        found = [(self._fleet.replicas[each.replica_id], each) for each in self._accepting()]
        best = max(_suits(replica, held) for replica, _ in found)
        if best <= suits:
            return chosen
        others = [(replica, each) for replica, each in found if _suits(replica, held) == best]
        return min(others, key=lambda one: one[1].num_requests)[0]

    def _accepting(self) -> Iterable[ReplicaView]:
        return (replica for replica in self._view.replicas.values() if replica.accepts)


def _suits(replica: Replica, held: OpenRequest) -> tuple[bool, bool, bool]:
    """Whether its catalog has all adapters, it has not refused to go on with the request, and its
    adapters are those that the answer was begun with."""
    known = replica.adapters
    names = [name for name, _ in held.request.weighted_adapters]
    has_all = all(name in known and known[name].refusal is None for name in names)
    is_new = replica.replica_id not in held.refused_by
    begun = held.digests if held.token_ids else None
    return has_all, is_new, begun is None or contents_of(replica, held.request) == begun
