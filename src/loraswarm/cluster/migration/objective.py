"""What a placement of requests is worth: the one definition that all solvers share.

    load_j    = sum over requests i on j of (work_i, and move_i if i was not there)
              + sum over adapters k that any of them needs of (share_k + seconds to bring k to j)
              + overflow_byte_s * max(0, bytes of K and V, and of those adapters, beyond j's pool)
    objective = max_j load_j + MEAN_WEIGHT * mean_j load_j

It is linear in which request is where, but for the maxima, so that an integer program can have it.
What that leaves out: a load is work at full steps, as if a replica always had as many rows as it
can run, so a step's fixed part is shared evenly and the order of requests does not count; an
adapter's share is the same however many of its requests are on a replica; a move costs the target
alone; bytes beyond the pool cost the same whenever they are needed. The mean's small weight keeps
moves from being made, adapters from being spread and pools from overflowing where the most loaded
replica would gain nothing.

Indices are those of the problem's tuples; adapters are counted in order of first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraswarm.cluster.migration.problem import (
    AdapterLoad,
    MigrationProblem,
    Move,
    NeededAdapter,
    Objective,
    Solution,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MEAN_WEIGHT = 0.1
"""What a second of every replica counts beside a second of the most loaded one."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """A problem by indices: `home` is where each request is, `adapters_of` what it needs.

    `held_s[k]` has, for replicas that hold adapter k, the seconds until it is in pages there;
    `limit_bytes` are what adapters in use may take: what a replica allows, or has now if that is
    more. `columns` are the same as arrays.
    """

    problem: MigrationProblem
    home: list[int]
    adapters_of: list[tuple[int, ...]]
    needed: list[NeededAdapter]
    held_s: list[dict[int, float]]
    limit_bytes: list[int]
    columns: Columns

    @classmethod
    def of(cls, problem: MigrationProblem) -> Indexed:
        place = {room.replica_id: j for j, room in enumerate(problem.replicas)}
        index: dict[str, int] = {}
        adapters_of = []
        for request in problem.requests:
            adapters_of.append(tuple(index.setdefault(a, len(index)) for a in request.adapters))
        home = [place[request.replica_id] for request in problem.requests]
        needed = [problem.adapters[name] for name in index]
        used: list[set[int]] = [set() for _ in problem.replicas]
        for j, adapters in zip(home, adapters_of, strict=True):
            used[j].update(adapters)
        limits = [
            max(room.adapter_bytes, sum(needed[k].num_bytes for k in adapters))
            for room, adapters in zip(problem.replicas, used, strict=True)
        ]
        columns = Columns.of(problem, home, adapters_of, needed)
        return cls(problem, home, adapters_of, needed, _held_s(problem, index), limits, columns)

    def entry_s(self, adapter: int, replica: int) -> float:
        """Seconds that `replica` spends once for any number of requests of `adapter`."""
        needed = self.needed[adapter]
        return needed.share_s + self.held_s[adapter].get(replica, needed.load_s)

    def may_host(self, request: int, replica: int) -> bool:
        """Whether it is there, or may come as far as the replica accepts."""
        return replica == self.home[request] or self.problem.replicas[replica].accepts


@dataclass(frozen=True, slots=True)
class Columns:
    """A problem's numbers as arrays: of N requests, J replicas and K adapters.

    `needed` [N, most adapters of a request] counts adapters; where a request has fewer it has K,
    whose `entry_s` and `entry_bytes` [K + 1] are 0. Those are of a replica that holds nothing.
    """

    home: Ints
    work_s: Floats
    move_s: Floats
    memory_bytes: Floats
    needed: Ints
    entry_s: Floats
    entry_bytes: Floats
    pool_bytes: Floats

    @classmethod
    def of(
        cls,
        problem: MigrationProblem,
        home: list[int],
        adapters_of: list[tuple[int, ...]],
        needed: list[NeededAdapter],
    ) -> Columns:
        requests = problem.requests
        width = max(map(len, adapters_of), default=0)
        padding = [(len(needed),) * (width - count) for count in range(width + 1)]
        padded = [adapters + padding[len(adapters)] for adapters in adapters_of]
        return cls(
            home=np.array(home, dtype=np.int64),
            work_s=np.array([request.work_s for request in requests], dtype=np.float64),
            move_s=np.array([request.move_s for request in requests], dtype=np.float64),
            memory_bytes=np.array([each.memory_bytes for each in requests], dtype=np.float64),
            needed=np.array(padded, dtype=np.int64).reshape(len(requests), width),
            entry_s=np.array([*(each.share_s + each.load_s for each in needed), 0.0]),
            entry_bytes=np.array([*(float(each.num_bytes) for each in needed), 0.0]),
            pool_bytes=np.array([float(room.pool_bytes) for room in problem.replicas]),
        )

    def sum_by_home(self, amounts: Floats) -> Floats:
        """[J] what the requests on each replica now have together of `amounts` [N]."""
        sums = np.bincount(self.home, amounts, minlength=len(self.pool_bytes))
        return sums.astype(np.float64)


def _held_s(problem: MigrationProblem, index: dict[str, int]) -> list[dict[int, float]]:
    held: list[dict[int, float]] = [{} for _ in index]
    for j, room in enumerate(problem.replicas):
        for name, tier in room.tiers.items():
            k = index.get(name)
            if k is not None:
                held[k][j] = problem.adapters[name].copy_s if tier == "host" else 0.0
    return held


def needed_on(indexed: Indexed, assignment: Sequence[int]) -> list[set[int]]:
    """For each replica, the adapters that its requests need."""
    needed: list[set[int]] = [set() for _ in indexed.problem.replicas]
    for j, adapters in zip(assignment, indexed.adapters_of, strict=True):
        needed[j].update(adapters)
    return needed


def objective_of(indexed: Indexed, assignment: Sequence[int]) -> Objective:
    """What it is worth that request i is on replica `assignment[i]`."""
    problem = indexed.problem
    loads = [0.0] * len(problem.replicas)
    used = [0] * len(problem.replicas)
    for request, home, j in zip(problem.requests, indexed.home, assignment, strict=True):
        loads[j] += request.work_s if home == j else request.work_s + request.move_s
        used[j] += request.memory_bytes
    for j, adapters in enumerate(needed_on(indexed, assignment)):
        for k in sorted(adapters):
            loads[j] += indexed.entry_s(k, j)
            used[j] += indexed.needed[k].num_bytes
    for j, room in enumerate(problem.replicas):
        loads[j] += problem.overflow_byte_s * max(0, used[j] - room.pool_bytes)
    mean_s = sum(loads) / len(loads)
    return Objective(tuple(loads), max(loads), mean_s, max(loads) + MEAN_WEIGHT * mean_s)


@dataclass(frozen=True, slots=True)
class Found:
    """What a solver found: a replica for each request, a bound, and how long that took."""

    assignment: Sequence[int]
    lower_bound_s: float
    seconds: float
    is_optimal: bool = False


def solution_of(indexed: Indexed, found: Found) -> Solution:
    """The moves that lead to a placement, and what they are worth.

    Raises   ValueError if a request is on a replica that does not accept it, or if adapters exceed
             what a replica allows and had: a bug of the solver's.
    """
    problem = indexed.problem
    after = needed_on(indexed, found.assignment)
    _check(indexed, found.assignment, after)
    before = needed_on(indexed, indexed.home)
    loads = [
        AdapterLoad(indexed.needed[k].name, room.replica_id)
        for j, room in enumerate(problem.replicas)
        for k in sorted(after[j] - before[j])
        if room.tiers.get(indexed.needed[k].name) != "device"
    ]
    moves = [
        Move(request.request_id, request.replica_id, problem.replicas[j].replica_id, request.how)
        for request, home, j in zip(problem.requests, indexed.home, found.assignment, strict=True)
        if j != home
    ]
    return Solution(
        moves=tuple(moves),
        adapter_loads=tuple(loads),
        before=objective_of(indexed, indexed.home),
        after=objective_of(indexed, found.assignment),
        lower_bound_s=found.lower_bound_s,
        seconds=found.seconds,
        is_optimal=found.is_optimal,
    )


def _check(indexed: Indexed, assignment: Sequence[int], needed: list[set[int]]) -> None:
    for i, j in enumerate(assignment):
        if not indexed.may_host(i, j):
            raise ValueError(f"request {i} cannot come to replica {j}")
    for j, adapters in enumerate(needed):
        if sum(indexed.needed[k].num_bytes for k in adapters) > indexed.limit_bytes[j]:
            raise ValueError(f"adapters on replica {j} exceed its limit")
