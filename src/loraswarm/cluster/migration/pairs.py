"""dLoRA's reactive migration as its artifact has it, between two replicas; for comparison.

    x_ij >= 0        share of request i on replica j          sum_j x_ij >= 1
    y_kj in {0, 1}   adapter k is on j                        n_k y_kj >= sum of x_ij of k
    sum_k y_kj <= number of adapters that j had
    M_j >= (sum_i blocks_i x_ij - blocks_j) * seconds to swap a block
    T >= sum_i exec_i x_ij + swap * (requests that come to j) + M_j          minimise T

A pair is chosen by memory (one replica nearly full, another not) or else by counts of requests; the
result is rounded to each request's largest share, and what moves is computed again. HiGHS solves it
here, CBC there. The costs of moves and loads are in what the solution is worth, by our objective,
and not in what this solver minimises.
Source   Wu et al., OSDI 2024, `engine_manager.py` and `migration_ilp.py` of the artifact.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraswarm.cluster.migration.bound import Bound
from loraswarm.cluster.migration.highs import Program
from loraswarm.cluster.migration.objective import Found, Indexed, needed_on, solution_of
from loraswarm.cluster.migration.problem import MigrationProblem, Solution

GIBIBYTE = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConstants:
    """The artifact's; None where `measured` takes the problem's own seconds.

    A pair is looked for where pools are filled to `full_share`, or a replica has `num_more`
    requests more than the mean. A request takes `exec_s`, a move `move_s`, a byte beyond the pool
    `swap_byte_s`.
    """

    full_share: float = 0.9
    num_more: float = 16.0
    exec_s: float | None = 5.0
    move_s: float | None = 0.05
    swap_byte_s: float | None = 1.0 / (32 * GIBIBYTE)


ARTIFACT = PairConstants()
MEASURED = PairConstants(exec_s=None, move_s=None, swap_byte_s=None)


@dataclass(frozen=True, slots=True)
class DloraPairs:
    """Solves for one pair of replicas, or moves nothing if none is chosen."""

    constants: PairConstants = ARTIFACT

    def solve(self, problem: MigrationProblem, time_limit_s: float = 60.0) -> Solution:
        """Raises ConfigError if HiGHS is not installed."""
        start_s = time.perf_counter()
        indexed = Indexed.of(_by_prefill(problem))
        assignment = list(indexed.home)
        pair = choose_pair(indexed, self.constants)
        if pair is not None:
            model = _PairModel(indexed, pair, self.constants)
            for i, j in model.solve(time_limit_s):
                assignment[i] = j
        bound_s = Bound(indexed).objective_s
        seconds = time.perf_counter() - start_s
        return solution_of(indexed, Found(assignment, bound_s, seconds))


def choose_pair(indexed: Indexed, constants: PairConstants) -> tuple[int, int] | None:
    """The two replicas to balance: by memory, else by how many requests are open; None if neither
    is as uneven as the constants say. Only replicas that accept are considered."""
    replicas = indexed.problem.replicas
    open_to = [j for j, room in enumerate(replicas) if room.accepts]
    if len(open_to) < 2:
        return None
    used, counts = [0] * len(replicas), [0] * len(replicas)
    for request, j in zip(indexed.problem.requests, indexed.home, strict=True):
        used[j] += request.memory_bytes
        counts[j] += 1
    fills = [used[j] / max(1, room.pool_bytes) for j, room in enumerate(replicas)]
    most, least = max(open_to, key=fills.__getitem__), min(open_to, key=fills.__getitem__)
    if fills[most] >= constants.full_share > fills[least]:
        return most, least
    most, least = max(open_to, key=counts.__getitem__), min(open_to, key=counts.__getitem__)
    mean = sum(counts[j] for j in open_to) / len(open_to)
    return (most, least) if counts[most] - mean >= constants.num_more else None


def _by_prefill(problem: MigrationProblem) -> MigrationProblem:
    """The artifact sends no K and V."""
    requests = (replace(each, kv_move_s=each.prefill_move_s) for each in problem.requests)
    return replace(problem, requests=tuple(requests))


class _PairModel:
    """The program of two replicas, and its columns."""

    def __init__(self, indexed: Indexed, pair: tuple[int, int], constants: PairConstants) -> None:
        self._indexed = indexed
        self._pair = pair
        self._constants = constants
        self._requests = [i for i, j in enumerate(indexed.home) if j in pair]
        self._adapters = sorted({k for i in self._requests for k in indexed.adapters_of[i]})
        self._program = Program()
        add = self._program.add_amount
        self._x = {(i, j): add() for i in self._requests for j in pair}
        self._y = {(k, j): self._program.add_binary() for k in self._adapters for j in pair}
        self._over_s = {j: add() for j in pair}
        self._makespan = add(cost=1.0)
        self._add_rows()

    def solve(self, time_limit_s: float) -> list[tuple[int, int]]:
        """Each request of the pair and the replica that has its largest share; where it is, if the
        shares are equal or nothing was found."""
        values = self._program.solve(time_limit_s, self._values_now()).values
        if values is None:
            return []
        home = self._indexed.home
        found = [
            (i, max(self._pair, key=lambda j, i=i: (values[self._x[i, j]], j == home[i])))  # type: ignore[misc]
            for i in self._requests
        ]
        return self._within_limits(found)

    def _within_limits(self, found: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The artifact counts adapters; where their bytes do not fit either, nothing moves."""
        indexed = self._indexed
        assignment = list(indexed.home)
        for i, j in found:
            assignment[i] = j
        needed = needed_on(indexed, assignment)
        used = {j: sum(indexed.needed[k].num_bytes for k in needed[j]) for j in self._pair}
        return found if all(used[j] <= indexed.limit_bytes[j] for j in self._pair) else []

    def _exec_s(self, request: int) -> float:
        given = self._constants.exec_s
        return self._indexed.problem.requests[request].work_s if given is None else given

    def _move_s(self, request: int) -> float:
        given = self._constants.move_s
        if given is not None:
            return given
        return self._indexed.problem.requests[request].prefill_move_s

    def _most_adapters(self, replica: int) -> int:
        """As many as it has in pages, or needs now."""
        indexed = self._indexed
        tiers = indexed.problem.replicas[replica].tiers
        num_held = sum(tier == "device" for tier in tiers.values())
        return max(num_held, len(needed_on(indexed, indexed.home)[replica]))

    def _add_rows(self) -> None:
        add_row = self._program.add_row
        for i in self._requests:
            add_row({self._x[i, j]: 1.0 for j in self._pair}, 1.0)
        for j in self._pair:
            for k in self._adapters:
                users = [i for i in self._requests if k in self._indexed.adapters_of[i]]
                weights = {self._x[i, j]: -1.0 for i in users}
                add_row({self._y[k, j]: float(len(users)), **weights}, 0.0)
            most = float(self._most_adapters(j))
            add_row({self._y[k, j]: 1.0 for k in self._adapters}, upper=most)
            self._add_load(j)

    def _add_load(self, replica: int) -> None:
        problem, home = self._indexed.problem, self._indexed.home
        given = self._constants.swap_byte_s
        byte_s = problem.overflow_byte_s if given is None else given
        swap, load = {self._over_s[replica]: 1.0}, {self._makespan: 1.0}
        for i in self._requests:
            swap[self._x[i, replica]] = -byte_s * problem.requests[i].memory_bytes
            moved_s = 0.0 if home[i] == replica else self._move_s(i)
            load[self._x[i, replica]] = -self._exec_s(i) - moved_s
        self._program.add_row(swap, -byte_s * problem.replicas[replica].pool_bytes)
        self._program.add_row({**load, self._over_s[replica]: -1.0}, 0.0)

    def _values_now(self) -> Sequence[float]:
        """All columns, for nothing moved: the start that the artifact means to give its solver."""
        indexed, constants = self._indexed, self._constants
        values = [0.0] * (self._makespan + 1)
        byte_s = constants.swap_byte_s
        byte_s = indexed.problem.overflow_byte_s if byte_s is None else byte_s
        for j in self._pair:
            here = [i for i in self._requests if indexed.home[i] == j]
            num_bytes = sum(indexed.problem.requests[i].memory_bytes for i in here)
            over_bytes = max(0, num_bytes - indexed.problem.replicas[j].pool_bytes)
            values[self._over_s[j]] = byte_s * over_bytes
            for i in here:
                values[self._x[i, j]] = 1.0
                for k in indexed.adapters_of[i]:
                    values[self._y[k, j]] = 1.0
            load_s = byte_s * over_bytes + sum(self._exec_s(i) for i in here)
            values[self._makespan] = max(values[self._makespan], load_s)
        return values
