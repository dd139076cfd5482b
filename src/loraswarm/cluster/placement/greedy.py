"""Who is placed where: adapters by falling load, each copy where it costs least.

Knows indices of adapters and replicas, no names. Makes the `Placement` that improve and burst work
on. Called by the planner.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loraswarm.cluster.placement.copies import Ints
from loraswarm.cluster.placement.demand import Demand

MAX_SKIPPED = 16
"""Replicas without room, or with the adapter already, that are passed over before a copy is given
up."""


@dataclass(slots=True, eq=False)
class Placement:
    """Adapters on replicas, with the load that each is taken to have there.

    `on[replica][adapter]` is that load, `loads` their sums, `room_bytes` what is left for more.
    `num_unplaced` copies had no room.
    """

    on: list[dict[int, float]]
    loads: list[float]
    room_bytes: list[float]
    num_unplaced: int = 0
    replicas_of: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def empty(cls, room_bytes: Sequence[float]) -> Placement:
        """No adapters on replicas that have so much room for them."""
        return cls([{} for _ in room_bytes], [0.0] * len(room_bytes), list(room_bytes))

    def put(self, adapter: int, replica: int, load: float, num_bytes: float) -> None:
        """One more copy."""
        self.on[replica][adapter] = load
        self.loads[replica] += load
        self.room_bytes[replica] -= num_bytes
        self.replicas_of.setdefault(adapter, []).append(replica)

    def take(self, adapter: int, replica: int, num_bytes: float) -> float:
        """One copy less; its load."""
        load = self.on[replica].pop(adapter)
        self.loads[replica] -= load
        self.room_bytes[replica] += num_bytes
        self.replicas_of[adapter].remove(replica)
        return load

    def set_load(self, adapter: int, replica: int, load: float) -> None:
        """A copy that is there has another share."""
        self.loads[replica] += load - self.on[replica][adapter]
        self.on[replica][adapter] = load


class _LeastLoaded:
    """Replicas by load. Entries of a heap are good while the load is still the replica's."""

    def __init__(self, placement: Placement, least_bytes: float) -> None:
        self._placement = placement
        self._least_bytes = least_bytes
        self._heap = [(load, replica) for replica, load in enumerate(placement.loads)]
        heapq.heapify(self._heap)

    def note(self, replica: int) -> None:
        """Its load has changed."""
        heapq.heappush(self._heap, (self._placement.loads[replica], replica))

    def find(self, adapter: int, num_bytes: float) -> int | None:
        """The least loaded that has room and not the adapter; looked for among few."""
        passed: list[tuple[float, int]] = []
        found = None
        while self._heap and len(passed) < MAX_SKIPPED:
            load, replica = self._heap[0]
            room_bytes = self._placement.room_bytes[replica]
            if load != self._placement.loads[replica] or room_bytes < self._least_bytes:
                heapq.heappop(self._heap)
            elif room_bytes < num_bytes or adapter in self._placement.on[replica]:
                passed.append(heapq.heappop(self._heap))
            else:
                found = replica
                break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found


@dataclass(frozen=True, slots=True)
class Held:
    """Replicas by adapter: where the last plan had it, and where it is resident. Copies stay there,
    first where they were planned, up to a load of `limit`."""

    planned: Mapping[int, Sequence[int]] = field(default_factory=dict)
    resident: Mapping[int, Sequence[int]] = field(default_factory=dict)
    limit: float = 0.0

    def has(self, adapter: int, replica: int) -> bool:
        """Whether a copy there costs nothing new."""
        return replica in self.planned.get(adapter, ()) or (
            replica in self.resident.get(adapter, ())
        )


def place(demand: Demand, num_copies: Ints, held: Held, room_bytes: Sequence[float]) -> Placement:
    """Place all copies anew.

    Semantics    by falling load of a copy: a replica's cost is its load so far, and the churn of
                 the adapter if it is not held there; the cheapest with room gets the copy. But one
                 that holds it, the least loaded of them, gets it in any case while its load does
                 not pass the limit: what is well enough where it is stays.
    Cost         logarithmic in the replicas for each copy.
    Source       longest processing time first (Graham 1969), with churn.
    """
    placement = Placement.empty(room_bytes)
    copy_loads = demand.copy_loads(num_copies.astype(float))
    has_copies = num_copies > 0
    least_bytes = float(demand.num_bytes[has_copies].min()) if has_copies.any() else 0.0
    least_loaded = _LeastLoaded(placement, least_bytes)
    sizes, churn = demand.num_bytes.tolist(), demand.churn.tolist()
    loads, counts = copy_loads.tolist(), num_copies.tolist()
    for adapter in (-copy_loads).argsort(kind="stable").tolist():
        size, load = sizes[adapter], loads[adapter]
        holders = _next_last(held, adapter, placement, size)
        for _ in range(counts[adapter]):
            while holders and adapter in placement.on[holders[-1]]:
                holders.pop()
            holder_load = placement.loads[holders[-1]] if holders else math.inf
            target = None
            if holder_load + load > held.limit:
                target = least_loaded.find(adapter, size)
            if holders and (
                target is None or holder_load <= placement.loads[target] + churn[adapter]
            ):
                target = holders.pop()
            if target is None:
                placement.num_unplaced += 1
                continue
            placement.put(adapter, target, load, size)
            least_loaded.note(target)
    return placement


def _next_last(held: Held, adapter: int, placement: Placement, num_bytes: float) -> list[int]:
    """Replicas that hold it and have room, in the order in which they are taken from the end: as
    they were planned, then as they are loaded."""
    room = placement.room_bytes
    found = [each for each in held.resident.get(adapter, ()) if room[each] >= num_bytes]
    if len(found) > 1:
        found.sort(key=lambda each: (-placement.loads[each], each))
    found += [each for each in held.planned.get(adapter, ())[::-1] if room[each] >= num_bytes]
    return found
