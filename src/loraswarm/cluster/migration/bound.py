"""An objective that no placement of a problem is below, in milliseconds for any size.

Where the largest load is T, all that has to be done fits into replicas that do at most T each:
every request's work, an adapter as often as its work takes replicas, bytes beyond all pools, and
the moves that bring each replica from its load now to T. The smallest T for which it fits is a
bound of the makespan. Used by `greedy`, and for problems that no integer program can solve.
"""

from __future__ import annotations

import numpy as np

from loraswarm.cluster.migration.objective import MEAN_WEIGHT, Indexed, objective_of
from loraswarm.cluster.migration.placement import Floats

NUM_HALVINGS = 40


class Bound:
    """`makespan_s` and `objective_s` that no placement is below."""

    def __init__(self, indexed: Indexed) -> None:
        problem = indexed.problem
        self._overflow_byte_s = problem.overflow_byte_s
        now = objective_of(indexed, indexed.home)
        self._now_s: Floats = np.array(now.loads_s)
        self._accepts = np.array([room.accepts for room in problem.replicas])
        self._work_s = sum(request.work_s for request in problem.requests)
        self._spare_bytes = float(
            sum(room.pool_bytes for room in problem.replicas)
            - sum(request.memory_bytes for request in problem.requests)
        )
        self._count_adapters(indexed)
        self._sort_leavers(indexed)
        self.makespan_s = max(self._find_makespan_s(), _longest_s(indexed, self._copy_s))
        least_s = self._total_s(now.objective_s)
        self.objective_s = self.makespan_s + MEAN_WEIGHT * least_s / len(self._now_s)

    def _find_makespan_s(self) -> float:
        low, high = 0.0, float(self._now_s.max())
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2.0
            if self._total_s(middle) <= float(self._room_s(middle).sum()):
                high = middle
            else:
                low = middle
        return low

    def _room_s(self, makespan_s: float) -> Floats:
        """What each replica can do; one that accepts nothing has no more than now."""
        return np.where(self._accepts, makespan_s, np.minimum(makespan_s, self._now_s))

    def _total_s(self, makespan_s: float) -> float:
        """What all replicas together have to do at least, if none does more than `makespan_s`."""
        beside_s = makespan_s - self._copy_s
        if len(beside_s) and float(beside_s.min()) <= 0.0:
            return np.inf
        num_copies = np.maximum(1.0, np.ceil(self._adapter_work_s / beside_s * (1.0 - 1e-9)))
        over_bytes = max(0.0, float(num_copies @ self._adapter_bytes) - self._spare_bytes)
        total_s = self._work_s + float(num_copies @ self._copy_s) + self._moves_s(makespan_s)
        return total_s + self._overflow_byte_s * over_bytes

    def _moves_s(self, makespan_s: float) -> float:
        """Least seconds of moves that bring every replica to `makespan_s`, parts of them allowed."""
        need_s = np.maximum(self._now_s - makespan_s, 0.0)
        if bool((need_s > self._leave_s * (1.0 + 1e-9)).any()):
            return np.inf
        reached = np.interp(self._begin_s + need_s, self._left_s, self._moved_s)
        return float((reached - np.interp(self._begin_s, self._left_s, self._moved_s)).sum())

    def _count_adapters(self, indexed: Indexed) -> None:
        """For each adapter: seconds and bytes of its cheapest copy, and the work it is in."""
        num_adapters = len(indexed.names)
        needed = [indexed.problem.adapters[name] for name in indexed.names]
        work_s = np.zeros(num_adapters)
        for request, adapters in zip(indexed.problem.requests, indexed.adapters_of, strict=True):
            for k in adapters:
                work_s[k] += request.work_s
        self._adapter_work_s: Floats = work_s
        self._adapter_bytes: Floats = np.array([float(each.num_bytes) for each in needed])
        self._copy_s: Floats = np.array(
            [
                each.share_s + min((each.load_s, *held.values()))
                for each, held in zip(needed, indexed.held_s, strict=True)
            ]
        )

    def _sort_leavers(self, indexed: Indexed) -> None:
        """Each replica's requests by what a move costs for a second that it is rid of, summed up.

        A replica is rid of no more than a request's work, its part of its adapters, and its bytes
        if they overflow now.
        """
        requests = indexed.problem.requests
        num_users: dict[tuple[int, int], int] = {}
        used = np.zeros(len(self._now_s))
        for i, j in enumerate(indexed.home):
            used[j] += requests[i].memory_bytes
            for k in indexed.adapters_of[i]:
                num_users[k, j] = num_users.get((k, j), 0) + 1
        for k, j in num_users:
            used[j] += indexed.adapter_bytes[k]
        overflows = used > np.array([room.pool_bytes for room in indexed.problem.replicas])
        out_s = np.array([request.work_s for request in requests])
        for i, j in enumerate(indexed.home):
            byte_s = self._overflow_byte_s if overflows[j] else 0.0
            out_s[i] += byte_s * requests[i].memory_bytes
            for k in indexed.adapters_of[i]:
                copy_s = indexed.entry_s(k, j) + byte_s * indexed.adapter_bytes[k]
                out_s[i] += copy_s / num_users[k, j]
        move_s = np.array([request.move_s for request in requests])
        home = np.array(indexed.home, dtype=np.int64)
        order = np.lexsort((move_s / np.maximum(out_s, 1e-30), home))
        self._left_s: Floats = np.concatenate(([0.0], np.cumsum(out_s[order])))
        self._moved_s: Floats = np.concatenate(([0.0], np.cumsum(move_s[order])))
        self._leave_s: Floats = np.bincount(home, out_s, minlength=len(self._now_s))
        self._begin_s: Floats = np.concatenate(([0.0], np.cumsum(self._leave_s)[:-1]))


def _longest_s(indexed: Indexed, copy_s: Floats) -> float:
    """The request that takes longest even if it is alone, and stays if that costs less."""
    longest_s = 0.0
    for request, adapters in zip(indexed.problem.requests, indexed.adapters_of, strict=True):
        longest_s = max(longest_s, request.work_s + sum(float(copy_s[k]) for k in adapters))
    return longest_s
