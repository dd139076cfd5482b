"""Plans which adapters which replicas should hold, and says what to prefetch where.

Owns what must last from plan to plan, so that plans change only where that is worth it. Reads the
view and a forecast; the front carries prefetches out, beside its loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from loraswarm.cluster.placement.burst import BurstTolerance
from loraswarm.cluster.placement.copies import Ints, apportion
from loraswarm.cluster.placement.demand import Demand
from loraswarm.cluster.placement.forecast import Rates
from loraswarm.cluster.placement.greedy import Held, Placement, place
from loraswarm.cluster.placement.improve import improve
from loraswarm.cluster.view import ClusterView, ReplicaView


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRules:
    """`pool_share` of a replica's pool may be planned for adapters. A plan is made for `horizon_s`:
    so long a gain must last to pay a load. Loads within `tolerance` of the mean are left alone; an
    adapter loses copies only when `patience` plans in a row want fewer. Local search and burst
    tolerance have `search_s` each; at most `max_prefetches` are told a replica at once, and
    `max_spare` copies for bursts are added for each replica.
    """

    pool_share: float = 0.5
    horizon_s: float = 60.0
    tolerance: float = 0.1
    patience: int = 3
    search_s: float = 0.02
    max_prefetches: int = 4
    max_spare: float = 0.5


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Bring the adapter to that replica's host memory, and to its pages if some are free."""

    replica_id: str
    adapter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where adapters should be, and what is missing there, most loaded first.

    Routing does not read a plan: it goes by what replicas hold, so that a plan takes effect when
    its prefetches have, and one that is late or wrong misleads nobody. What has no place in it
    leaves by eviction. `loads` are what replicas are predicted to have to do, as shares of their
    time; `num_unplaced` copies had no room, `num_improved` changes local search has made, and
    `num_spare` copies are for bursts.
    """

    prefetches: tuple[Prefetch, ...]
    loads: Mapping[str, float]
    num_unplaced: int = 0
    num_improved: int = 0
    num_spare: int = 0
    names: list[str] = field(default_factory=list)
    placement: Placement = field(default_factory=lambda: Placement.empty(()))

    def places(self) -> dict[str, tuple[str, ...]]:
        """Replicas by adapter; made anew, which takes a while for very many."""
        ids = tuple(self.loads)
        return {
            self.names[adapter]: tuple(ids[replica] for replica in replicas)
            for adapter, replicas in self.placement.replicas_of.items()
        }


class Planner:
    """Plans for one cluster, each beginning at what is resident and what was to be prefetched."""

    def __init__(
        self,
        rules: PlacementRules | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._rules = rules or PlacementRules()
        self._clock = clock
        self._last = Plan(prefetches=(), loads={})
        self._num_copies: dict[str, int] = {}
        self._num_lower: dict[str, int] = {}

    def plan(self, view: ClusterView, rates: Rates) -> Plan:
        """A plan for the replicas that accept requests; without any, nothing is planned."""
        replicas = [replica for replica in view.replicas.values() if replica.accepts]
        if not replicas:
            return Plan(prefetches=(), loads={})
        rules, clock = self._rules, self._clock
        demand = Demand.of(rates, view, replicas[0].limits, rules.horizon_s)
        num_copies = self._count_copies(rates.names, demand, len(replicas))
        pools = [float(each.limits.num_pages * each.limits.page_bytes) for each in replicas]
        rooms = [rules.pool_share * pool for pool in pools]
        total = float((demand.copy_loads(num_copies.astype(float)) * num_copies).sum())
        limit = total / len(replicas) * (1.0 + rules.tolerance)
        numbers = {replica.replica_id: number for number, replica in enumerate(replicas)}
        held = Held(
            self._planned(rates.names, numbers), _resident(rates.names, view, numbers), limit
        )
        placement = place(demand, num_copies, held, rooms)
        num_spare = self._add_spare(placement, demand, pools, held)
        deadline_s = clock() + rules.search_s
        num_improved = improve(placement, demand, rules.tolerance, deadline_s, clock)
        prefetches = self._prefetches(rates.names, placement, replicas)
        self._last = Plan(
            prefetches=prefetches,
            loads={each.replica_id: placement.loads[j] for j, each in enumerate(replicas)},
            num_unplaced=placement.num_unplaced,
            num_improved=num_improved,
            num_spare=num_spare,
            names=rates.names,
            placement=placement,
        )
        return self._last

    def _count_copies(self, names: list[str], demand: Demand, num_replicas: int) -> Ints:
        """By largest remainder; fewer than before only if that has been wanted for a while.

        Only adapters with several copies are remembered.
        """
        num_total = int((demand.work > 0).sum()) + num_replicas - 1
        counts = apportion(demand.work, num_total, num_replicas)
        before, num_lower = self._num_copies, self._num_lower
        self._num_lower = {}
        for row, name in enumerate(names) if before else ():
            most = min(before.get(name, 0), num_replicas)
            if counts[row] >= most:
                continue
            self._num_lower[name] = num_lower.get(name, 0) + 1
            if self._num_lower[name] < self._rules.patience:
                counts[row] = most
        several = np.flatnonzero(counts > 1).tolist()
        self._num_copies = {names[row]: int(counts[row]) for row in several}
        return counts

    def _planned(self, names: list[str], numbers: Mapping[str, int]) -> Mapping[int, list[int]]:
        """Where the last plan had adapters, by what they and the replicas are numbered now.

        Mostly they are numbered as then: new ones come behind.
        """
        last = self._last
        is_same = list(numbers) == list(last.loads)
        if is_same and names[: len(last.names)] == last.names:
            return last.placement.replicas_of
        places = last.places()
        return {
            row: [numbers[each] for each in places[name] if each in numbers]
            for row, name in enumerate(names)
            if name in places
        }

    def _add_spare(
        self, placement: Placement, demand: Demand, pools: list[float], held: Held
    ) -> int:
        """Copies for bursts, in the room that is left for adapters."""
        rest = 1.0 - self._rules.pool_share
        free_bytes = [
            rest * pool + room for pool, room in zip(pools, placement.room_bytes, strict=True)
        ]
        tolerance = BurstTolerance(placement, demand, free_bytes, held)
        max_copies = int(self._rules.max_spare * len(pools))
        deadline_s = self._clock() + self._rules.search_s
        return tolerance.raise_least(max_copies, deadline_s, self._clock)

    def _prefetches(
        self, names: list[str], placement: Placement, replicas: list[ReplicaView]
    ) -> tuple[Prefetch, ...]:
        found: list[tuple[float, Prefetch]] = []
        for replica, loads in zip(replicas, placement.on, strict=True):
            missing = [
                (load, names[adapter])
                for adapter, load in loads.items()
                if names[adapter] not in replica.tiers
            ]
            missing.sort(key=lambda each: (-each[0], each[1]))
            for load, name in missing[: self._rules.max_prefetches]:
                found.append((load, Prefetch(replica.replica_id, name)))
        found.sort(key=lambda each: -each[0])
        return tuple(prefetch for _, prefetch in found)


def _resident(
    names: list[str], view: ClusterView, numbers: Mapping[str, int]
) -> dict[int, list[int]]:
    """Replicas that have an adapter in pages or in host memory, by adapter."""
    resident = {}
    for row, name in enumerate(names):
        if where := view.holders.get(name):
            resident[row] = [numbers[each] for each in where if each in numbers]
    return resident
