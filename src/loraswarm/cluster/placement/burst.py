"""Burst tolerance: more copies of the adapters that a burst would soonest find without memory.

Works on a Placement in place. Called by the planner last, with the room that is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from loraswarm.cluster.placement.demand import Demand
from loraswarm.cluster.placement.greedy import Held, Placement

MAX_WATCHED = 2000
"""Adapters that are looked at: those with the largest share for a copy. Replicas' free bytes differ
far less than shares do, so that the least tolerance is among them."""


class BurstTolerance:
    """How large a burst each adapter could take.

    Semantics    tolerance of k = (sum of the free bytes of the replicas that have k) / (share of k
                 in the load); the least of all adapters is the cluster's.
    Source       dLoRA (OSDI 2024), proactive placement: find_best_lora_weight_schedule. There all
                 shares are equal; here they are the forecast's.
    """

    def __init__(
        self,
        placement: Placement,
        demand: Demand,
        free_bytes: Sequence[float],
        held: Held | None = None,
    ) -> None:
        """`free_bytes` are the replicas' for K/V, with all that is placed in its place."""
        self._held = held or Held()
        self._placement = placement
        self._demand = demand
        self._free = list(free_bytes)
        total = float(demand.work.sum()) or 1.0
        self._shares = (demand.work / total).tolist()

    def of(self, adapter: int) -> float:
        """Bytes; infinite for one without load."""
        free = sum(self._free[replica] for replica in self._placement.replicas_of[adapter])
        share = self._shares[adapter]
        return free / share if share else float("inf")

    def least(self) -> float:
        """The cluster's; infinite where nothing is placed."""
        return min(map(self.of, self._placement.replicas_of), default=float("inf"))

    def raise_least(self, max_copies: int, deadline_s: float, clock: Callable[[], float]) -> int:
        """Add at most so many copies, each for the adapter of least tolerance, where it is held or
        else where most is free. Returns how many.

        Until one would lower the least, nobody has room, or `clock` has come to `deadline_s`.
        """
        heap = [(self.of(adapter), adapter) for adapter in self._watched()]
        heapq.heapify(heap)
        num_added = 0
        while heap and num_added < max_copies and clock() < deadline_s:
            known, adapter = heap[0]
            tolerance = self.of(adapter)
            if tolerance != known:
                heapq.heapreplace(heap, (tolerance, adapter))  # others have changed it
                continue
            replica = self._freest_without(adapter)
            if replica is None or not self._may_take(replica, adapter, tolerance):
                break
            self._add(adapter, replica)
            heapq.heapreplace(heap, (self.of(adapter), adapter))
            num_added += 1
        return num_added

    def _watched(self) -> list[int]:
        places = self._placement.replicas_of
        return heapq.nlargest(
            MAX_WATCHED, places, key=lambda adapter: self._shares[adapter] / len(places[adapter])
        )

    def _freest_without(self, adapter: int) -> int | None:
        placement, num_bytes = self._placement, self._demand.num_bytes[adapter]
        fitting = (
            replica
            for replica, room in enumerate(placement.room_bytes)
            if room >= num_bytes and adapter not in placement.on[replica]
        )
        held, free = self._held, self._free
        return max(fitting, key=lambda each: (held.has(adapter, each), free[each]), default=None)

    def _may_take(self, replica: int, adapter: int, least: float) -> bool:
        """Whether no adapter there, which lose the bytes of a copy, comes below the least."""
        num_bytes = float(self._demand.num_bytes[adapter])
        for other in self._placement.on[replica]:
            share = self._shares[other]
            if share and self.of(other) - num_bytes / share < least:
                return False
        return self._free[replica] > num_bytes

    def _add(self, adapter: int, replica: int) -> None:
        """One more copy, with nothing to do: routing uses it where that relieves others."""
        num_bytes = float(self._demand.num_bytes[adapter])
        self._free[replica] -= num_bytes
        self._placement.put(adapter, replica, 0.0, num_bytes)
