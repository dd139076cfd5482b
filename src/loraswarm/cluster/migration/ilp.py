"""The integer program of migration: `objective` as it stands, for any number of replicas.

    x_ij in {0, 1}   request i is on replica j              sum_j x_ij = 1
    y_kj in {0, 1}   adapter k is needed on j               y_kj >= x_ij for each i that needs k
    M_j >= 0         bytes beyond j's pool                  M_j >= sum of K, V and adapters - pool_j
    T                the largest load                       T >= load_j
    sum_k bytes_k y_kj <= what j allows, or has now if that is more
    minimise         T + MEAN_WEIGHT * mean_j load_j

After dLoRA (Wu et al., OSDI 2024), where x may be broken, adapters are counted instead of weighed,
moves cost a constant and two replicas take part; `pairs` has that. Only for small problems, in
tests and benchmarks: it takes minutes where `greedy` takes milliseconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from loraswarm.cluster.migration.bound import Bound
from loraswarm.cluster.migration.greedy import Greedy
from loraswarm.cluster.migration.highs import Program
from loraswarm.cluster.migration.objective import (
    MEAN_WEIGHT,
    Found,
    Indexed,
    objective_of,
    solution_of,
)
from loraswarm.cluster.migration.problem import MigrationProblem, Solution, Solver

MEBIBYTE = 2**20
"""Rows of bytes are in mebibytes: HiGHS's tolerances are absolute, about 1e-6."""
GREEDY_SHARE = 0.1
"""Of the time limit, for the placement that the search starts from."""


@dataclass(frozen=True, slots=True)
class Ilp:
    """Starts from what `first` finds; None: from where the requests are."""

    first: Solver | None = field(default_factory=Greedy)

    def solve(self, problem: MigrationProblem, time_limit_s: float = 60.0) -> Solution:
        """Raises ConfigError if HiGHS is not installed."""
        start_s = time.perf_counter()
        indexed = Indexed.of(problem)
        first = list(indexed.home)
        if self.first is not None:
            first = _assignment(indexed, self.first.solve(problem, GREEDY_SHARE * time_limit_s))
        model = _Model(indexed)
        left_s = time_limit_s - (time.perf_counter() - start_s)
        result = model.program.solve(left_s, model.values_of(first))
        best, is_optimal = first, False
        if result.values is not None:
            found = model.assignment_of(result.values)
            if objective_of(indexed, found).objective_s <= objective_of(indexed, first).objective_s:
                best, is_optimal = found, result.is_optimal
        bound_s = max(result.bound, Bound(indexed).objective_s)
        seconds = time.perf_counter() - start_s
        return solution_of(indexed, Found(best, bound_s, seconds, is_optimal))


async def solve_off_loop(
    solver: Solver, problem: MigrationProblem, time_limit_s: float
) -> Solution:
    """Solve on a thread, while the event loop goes on. A problem is frozen, so none can change it.

    HiGHS runs without the interpreter's lock. If the task is cancelled, the thread still runs to
    its time limit and its solution is dropped.
    """
    return await asyncio.to_thread(solver.solve, problem, time_limit_s)


def _assignment(indexed: Indexed, solution: Solution) -> list[int]:
    place = {room.replica_id: j for j, room in enumerate(indexed.problem.replicas)}
    target = {move.request_id: place[move.target] for move in solution.moves}
    return [
        target.get(request.request_id, home)
        for request, home in zip(indexed.problem.requests, indexed.home, strict=True)
    ]


class _Model:
    """Columns and rows of a problem."""

    def __init__(self, indexed: Indexed) -> None:
        self._indexed = indexed
        self.program = Program()
        problem = indexed.problem
        self._replicas = range(len(problem.replicas))
        self._x = [
            [self.program.add_binary(float(indexed.may_host(i, j))) for j in self._replicas]
            for i in range(len(problem.requests))
        ]
        self._y = [[self.program.add_binary() for _ in self._replicas] for _ in indexed.needed]
        self._over = [self.program.add_amount() for _ in self._replicas]
        weight = MEAN_WEIGHT / len(problem.replicas)
        self._load = [self.program.add_amount(cost=weight) for _ in self._replicas]
        self._makespan = self.program.add_amount(cost=1.0)
        self._add_rows()

    def values_of(self, assignment: Sequence[int]) -> list[float]:
        """All columns, for a placement."""
        indexed = self._indexed
        problem = indexed.problem
        values = [0.0] * (self._makespan + 1)
        used = [0] * len(problem.replicas)
        for i, j in enumerate(assignment):
            values[self._x[i][j]] = 1.0
            used[j] += problem.requests[i].memory_bytes
            for k in indexed.adapters_of[i]:
                values[self._y[k][j]] = 1.0
        for j, room in enumerate(problem.replicas):
            used[j] += sum(
                adapter.num_bytes
                for k, adapter in enumerate(indexed.needed)
                if values[self._y[k][j]] == 1.0
            )
            values[self._over[j]] = max(0, used[j] - room.pool_bytes) / MEBIBYTE
        objective = objective_of(indexed, assignment)
        for j, load_s in enumerate(objective.loads_s):
            values[self._load[j]] = load_s
        values[self._makespan] = objective.makespan_s
        return values

    def assignment_of(self, values: Sequence[float]) -> list[int]:
        return [max(self._replicas, key=lambda j: values[row[j]]) for row in self._x]

    def _add_rows(self) -> None:
        indexed, add_row = self._indexed, self.program.add_row
        for i, row in enumerate(self._x):
            add_row(dict.fromkeys(row, 1.0), 1.0, 1.0)
            for k in indexed.adapters_of[i]:
                for j in self._replicas:
                    add_row({self._y[k][j]: 1.0, row[j]: -1.0}, 0.0)
        for j in self._replicas:
            limit = indexed.limit_bytes[j] / MEBIBYTE
            sizes = (adapter.num_bytes / MEBIBYTE for adapter in indexed.needed)
            add_row({self._y[k][j]: size for k, size in enumerate(sizes)}, upper=limit)
            self._add_overflow(j)
            self._add_load(j)
            add_row({self._makespan: 1.0, self._load[j]: -1.0}, 0.0)

    def _add_overflow(self, replica: int) -> None:
        """M_j - sum of bytes >= -pool_j."""
        problem = self._indexed.problem
        weights = {self._over[replica]: 1.0}
        for row, request in zip(self._x, problem.requests, strict=True):
            weights[row[replica]] = -request.memory_bytes / MEBIBYTE
        for k, adapter in enumerate(self._indexed.needed):
            weights[self._y[k][replica]] = -adapter.num_bytes / MEBIBYTE
        self.program.add_row(weights, -problem.replicas[replica].pool_bytes / MEBIBYTE)

    def _add_load(self, replica: int) -> None:
        """load_j - sum of its terms = 0."""
        indexed = self._indexed
        weights = {self._load[replica]: 1.0}
        weights[self._over[replica]] = -indexed.problem.overflow_byte_s * MEBIBYTE
        for i, request in enumerate(indexed.problem.requests):
            moved_s = 0.0 if indexed.home[i] == replica else request.move_s
            weights[self._x[i][replica]] = -request.work_s - moved_s
        for k in range(len(indexed.needed)):
            weights[self._y[k][replica]] = -indexed.entry_s(k, replica)
        self.program.add_row(weights, 0.0, 0.0)
