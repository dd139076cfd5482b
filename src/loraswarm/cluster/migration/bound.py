"""An objective that no placement of a problem is below, in milliseconds for any size.

Where the largest load is T, all that has to be done fits into replicas that do at most T each:
every request's work, an adapter as often as its work takes replicas, bytes beyond all pools, and
the moves that bring each replica from its load now to T. The smallest T for which it fits is a
bound of the makespan. Used by `greedy`, and for problems that no integer program can solve.
"""

from __future__ import annotations

import numpy as np

from loraswarm.cluster.migration.objective import MEAN_WEIGHT, Floats, Indexed

NUM_HALVINGS = 30


class Bound:
    """`makespan_s` and `objective_s` that no placement is below."""

    def __init__(self, indexed: Indexed) -> None:
        columns = indexed.columns
        self._columns = columns
        self._overflow_byte_s = indexed.problem.overflow_byte_s
        self._accepts = np.array([room.accepts for room in indexed.problem.replicas])
        self._work_s = float(columns.work_s.sum())
        self._spare_bytes = float(columns.pool_bytes.sum() - columns.memory_bytes.sum())
        self._count_adapters(indexed)
        self._see_now(indexed)
        longest_s = columns.work_s + np.append(self._copy_s, 0.0)[columns.needed].sum(axis=1)
        self.makespan_s = max(self._find_makespan_s(), float(longest_s.max(initial=0.0)))
        now_s = float(self._now_s.max()) + MEAN_WEIGHT * float(self._now_s.mean())
        least_s = self._total_s(max(now_s, self.makespan_s))
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
        """Least seconds of moves that bring all replicas to `makespan_s`, parts of them allowed."""
        need_s = np.maximum(self._now_s - makespan_s, 0.0)
        if bool((need_s > self._leave_s * (1.0 + 1e-9)).any()):
            return np.inf
        reached = np.interp(self._begin_s + need_s, self._left_s, self._moved_s)
        return float((reached - np.interp(self._begin_s, self._left_s, self._moved_s)).sum())

    def _count_adapters(self, indexed: Indexed) -> None:
        """For each adapter: seconds and bytes of its cheapest copy, and the work it is in."""
        columns, num_adapters = self._columns, len(indexed.needed)
        work_s = np.zeros(num_adapters + 1)
        for needed in columns.needed.T:
            work_s += np.bincount(needed, columns.work_s, num_adapters + 1)
        self._adapter_work_s: Floats = work_s[:-1]
        self._adapter_bytes: Floats = columns.entry_bytes[:-1]
        self._copy_s: Floats = np.array(
            [
                each.share_s + min((each.load_s, *held.values()))
                for each, held in zip(indexed.needed, indexed.held_s, strict=True)
            ]
        )

    def _see_now(self, indexed: Indexed) -> None:
        """Loads as they are, and each replica's requests by what a move costs for a second that it
        is rid of, summed up.

        A replica is rid of no more than a request's work, its part of its adapters, and its bytes
        if they overflow now.
        """
        columns = self._columns
        users: dict[tuple[int, int], list[int]] = {}
        for i, adapters in enumerate(indexed.adapters_of):
            for k in adapters:
                users.setdefault((k, indexed.home[i]), []).append(i)
        now_s = columns.sum_by_home(columns.work_s)
        used = columns.sum_by_home(columns.memory_bytes)
        for k, j in users:
            now_s[j] += indexed.entry_s(k, j)
            used[j] += indexed.needed[k].num_bytes
        over_bytes = np.maximum(used - columns.pool_bytes, 0.0)
        byte_s = np.where(over_bytes > 0.0, self._overflow_byte_s, 0.0)
        out_s = columns.work_s + byte_s[columns.home] * columns.memory_bytes
        for (k, j), needing in users.items():
            copy_s = indexed.entry_s(k, j) + float(byte_s[j]) * indexed.needed[k].num_bytes
            for i in needing:
                out_s[i] += copy_s / len(needing)
        self._now_s: Floats = now_s + self._overflow_byte_s * over_bytes
        self._sort_leavers(out_s)

    def _sort_leavers(self, out_s: Floats) -> None:
        columns = self._columns
        order = np.lexsort((columns.move_s / np.maximum(out_s, 1e-30), columns.home))
        self._left_s: Floats = np.concatenate(([0.0], np.cumsum(out_s[order])))
        self._moved_s: Floats = np.concatenate(([0.0], np.cumsum(columns.move_s[order])))
        num_here = np.bincount(columns.home, minlength=len(self._now_s))
        ends = np.concatenate(([0], np.cumsum(num_here)))
        self._begin_s: Floats = self._left_s[ends[:-1]]
        self._leave_s: Floats = self._left_s[ends[1:]] - self._begin_s
