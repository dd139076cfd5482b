"""Local search: takes load from the most loaded replica while that is worth its churn.

Works on a Placement in place, within a time budget. Called by the planner after greedy.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple

from loraswarm.cluster.placement.demand import Demand
from loraswarm.cluster.placement.greedy import Placement

NUM_TARGETS = 3
"""Least loaded replicas that are tried."""
LEAST_GAIN = 1e-6


class Change(NamedTuple):
    """`load` of `adapter` goes from the most loaded replica to `target`: a part of it, if both have
    the adapter; else the copy, in exchange for `other`'s if that is not None.

    `gain` is by how much the larger of the two loads falls, less the churn.
    """

    gain: float
    target: int
    adapter: int
    load: float
    other: int | None = None


def improve(
    placement: Placement,
    demand: Demand,
    tolerance: float,
    deadline_s: float,
    clock: Callable[[], float],
) -> int:
    """Make changes until the most loaded replica is within `tolerance` (a share) of the mean, no
    change helps it, or `clock` has come to `deadline_s`; returns how many were made."""
    num_changes = 0
    num_replicas = len(placement.loads)
    if num_replicas < 2:
        return 0
    limit = sum(placement.loads) / num_replicas * (1.0 + tolerance)
    while clock() < deadline_s:
        source = max(range(num_replicas), key=placement.loads.__getitem__)
        if placement.loads[source] <= limit:
            break
        targets = heapq.nsmallest(NUM_TARGETS, range(num_replicas), key=placement.loads.__getitem__)
        found = [each for to in targets for each in _changes(placement, demand, source, to)]
        best = max(found, default=None)
        if best is None or best.gain < LEAST_GAIN:
            break
        _make(placement, demand, source, best)
        num_changes += 1
    return num_changes


def _changes(placement: Placement, demand: Demand, source: int, target: int) -> Iterator[Change]:
    """The changes between two replicas that relieve the source."""
    gap = placement.loads[source] - placement.loads[target]
    here, there = placement.on[source], placement.on[target]
    room = placement.room_bytes[target]
    swaps = sorted((load, adapter) for adapter, load in there.items() if adapter not in here)
    for adapter, load in here.items():
        if adapter in there:
            part = min(load, gap / 2)
            yield Change(part, target, adapter, part)
            continue
        churn = float(demand.churn[adapter])
        if demand.num_bytes[adapter] <= room:
            yield Change(min(load, gap - load) - churn, target, adapter, load)
        # In exchange for one that leaves both about equal: of load - gap / 2.
        nearest = bisect_left(swaps, (load - gap / 2, -1))
        for other_load, other in swaps[max(nearest - 1, 0) : nearest + 1]:
            moved = load - other_load
            both_churn = churn + float(demand.churn[other])
            if _have_room(placement, demand, (source, target), (adapter, other)):
                yield Change(min(moved, gap - moved) - both_churn, target, adapter, load, other)


def _have_room(
    placement: Placement, demand: Demand, replicas: tuple[int, int], adapters: tuple[int, int]
) -> bool:
    """Whether each of two replicas has room for the other's adapter in the place of its own."""
    more_bytes = float(demand.num_bytes[adapters[0]] - demand.num_bytes[adapters[1]])
    source_room, target_room = (placement.room_bytes[replica] for replica in replicas)
    return -more_bytes <= source_room and more_bytes <= target_room


def _make(placement: Placement, demand: Demand, source: int, change: Change) -> None:
    adapter, target = change.adapter, change.target
    if adapter in placement.on[target]:
        left = placement.on[source][adapter] - change.load
        placement.set_load(adapter, source, left)
        placement.set_load(adapter, target, placement.on[target][adapter] + change.load)
        return
    _move(placement, demand, adapter, source, target)
    if change.other is not None:
        _move(placement, demand, change.other, target, source)


def _move(placement: Placement, demand: Demand, adapter: int, source: int, target: int) -> None:
    num_bytes = float(demand.num_bytes[adapter])
    load = placement.take(adapter, source, num_bytes)
    placement.put(adapter, target, load, num_bytes)
