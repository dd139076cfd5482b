"""A placement that is changed request by request, and what each change would cost.

The objective's terms, kept with every move (`objective` defines them; a test compares). What is
asked of many requests or replicas at once is answered in arrays, as a search asks for it by the
thousand. Used by `greedy` alone.
"""

from __future__ import annotations

import numpy as np

from loraswarm.cluster.migration.objective import MEAN_WEIGHT, Floats, Indexed, Ints

MAX_CACHED = 4_000_000
"""Numbers in rows of adapters that are kept."""


class Placement:
    """Where each request is (`at`), who is on each replica, and their loads.

    `base_s` are loads without what overflows; `used_bytes` are of K, V and adapters, those of
    adapters alone are `adapter_bytes`. `out_s` and `out_bytes` are, for each request, what its
    replica is rid of without it, but for overflow.
    """

    def __init__(self, indexed: Indexed) -> None:
        columns, num_replicas = indexed.columns, len(indexed.problem.replicas)
        self._indexed = indexed
        self._columns = columns
        self._overflow_byte_s = indexed.problem.overflow_byte_s
        self.num_replicas = num_replicas
        self.at = list(indexed.home)
        self.members: list[dict[int, None]] = [{} for _ in range(num_replicas)]
        self.base_s: Floats = columns.sum_by_home(columns.work_s)
        self.used_bytes: Floats = columns.sum_by_home(columns.memory_bytes)
        self.adapter_bytes: Floats = np.zeros(num_replicas)
        self.out_s: Floats = columns.work_s.copy()
        self.out_bytes: Floats = columns.memory_bytes.copy()
        self._is_closed = np.array([not room.accepts for room in indexed.problem.replicas])
        self._limit_bytes: Floats = np.array(indexed.limit_bytes, dtype=np.float64)
        self._users: list[dict[int, set[int]]] = [{} for _ in indexed.needed]
        self._present: list[dict[int, None]] = [{} for _ in range(num_replicas)]
        self._held_at: list[list[tuple[int, float]]] = [[] for _ in range(num_replicas)]
        self._rows = _Rows(indexed)
        self._fill()

    def loads_s(self) -> Floats:
        return self.base_s + self.overflow_s(self.used_bytes)

    def load_s(self, replica: int) -> float:
        over_bytes = self.used_bytes[replica] - self._columns.pool_bytes[replica]
        return float(self.base_s[replica]) + self._overflow_byte_s * max(0.0, float(over_bytes))

    def objective_s(self) -> float:
        loads = self.loads_s()
        return float(loads.max()) + MEAN_WEIGHT * float(loads.sum()) / self.num_replicas

    def overflow_s(self, used_bytes: Floats, replicas: int | Ints | None = None) -> Floats:
        """Seconds of overflow if so many bytes are used; the last axis is of all replicas, of
        `replicas`, or of anything on one of them."""
        pool = self._columns.pool_bytes
        over = used_bytes - (pool if replicas is None else pool[replicas])
        over_s: Floats = self._overflow_byte_s * np.maximum(over, 0.0)
        return over_s

    def load_without_s(self, replica: int, requests: Ints) -> Floats:
        """The replica's load without each of these, which are on it."""
        used_bytes = self.used_bytes[replica] - self.out_bytes[requests]
        base_s: Floats = self.base_s[replica] - self.out_s[requests]
        return base_s + self.overflow_s(used_bytes, replica)

    def entries(self, requests: Ints) -> tuple[Floats, Floats]:
        """[N, J] seconds and bytes by which each replica's `base_s` and `used_bytes` would grow.

        Seconds are infinite where a request may not come: the replica does not accept, or has no
        room for its adapters. Where it is now is of no meaning.
        """
        columns = self._columns
        home = columns.home[requests]
        seconds, new_bytes = self._rows.sums(columns.needed[requests], self._users)
        seconds += (columns.work_s[requests] + columns.move_s[requests])[:, None]
        lines = np.arange(len(requests))
        seconds[lines, home] -= columns.move_s[requests]
        at_home = seconds[lines, home]
        seconds[:, self._is_closed] = np.inf
        seconds[lines, home] = at_home
        has_room = (self.adapter_bytes + new_bytes <= self._limit_bytes) | (new_bytes == 0.0)
        seconds[~has_room] = np.inf
        return seconds, new_bytes + columns.memory_bytes[requests][:, None]

    def entries_at(self, replica: int, requests: Ints) -> tuple[Floats, Floats]:
        """[N] the same for one replica; whether it has room for adapters is not asked."""
        columns = self._columns
        entry_s, entry_bytes = columns.entry_s.copy(), columns.entry_bytes.copy()
        for k, seconds in self._held_at[replica]:
            entry_s[k] = seconds
        present = list(self._present[replica])
        entry_s[present] = 0.0
        entry_bytes[present] = 0.0
        needed = columns.needed[requests]
        is_home = columns.home[requests] == replica
        in_s = columns.work_s[requests] + np.where(is_home, 0.0, columns.move_s[requests])
        in_s += entry_s[needed].sum(axis=1)
        if self._is_closed[replica]:
            in_s[~is_home] = np.inf
        return in_s, columns.memory_bytes[requests] + entry_bytes[needed].sum(axis=1)

    def fits(self, replica: int) -> bool:
        """Whether its adapters are within its limit."""
        return bool(self.adapter_bytes[replica] <= self._limit_bytes[replica])

    def move(self, request: int, target: int) -> None:
        source = self.at[request]
        self._leave(request, source)
        self._enter(request, target)
        self.at[request] = target
        self._refresh(request)
        for k in self._indexed.adapters_of[request]:
            self._refresh_alone(k, source)
            self._refresh_alone(k, target)

    def _fill(self) -> None:
        """Put every request where it is at home; sums of the requests' own are there already."""
        indexed = self._indexed
        for k, held in enumerate(indexed.held_s):
            for j, seconds in held.items():
                self._held_at[j].append((k, indexed.needed[k].share_s + seconds))
        for i, j in enumerate(self.at):
            self.members[j][i] = None
            for k in indexed.adapters_of[i]:
                self._users[k].setdefault(j, set()).add(i)
        for k, users in enumerate(self._users):
            for j in users:
                self._count_adapter(k, j, 1.0)
                self._refresh_alone(k, j)

    def _enter(self, request: int, replica: int) -> None:
        self.members[replica][request] = None
        self._count(request, replica, 1.0)
        for k in self._indexed.adapters_of[request]:
            users = self._users[k].setdefault(replica, set())
            if not users:
                self._count_adapter(k, replica, 1.0)
            users.add(request)

    def _leave(self, request: int, replica: int) -> None:
        del self.members[replica][request]
        self._count(request, replica, -1.0)
        for k in self._indexed.adapters_of[request]:
            users = self._users[k][replica]
            users.remove(request)
            if not users:
                del self._users[k][replica]
                self._count_adapter(k, replica, -1.0)

    def _own_s(self, request: int, replica: int) -> float:
        columns = self._columns
        work_s, move_s = float(columns.work_s[request]), float(columns.move_s[request])
        return work_s if replica == self._indexed.home[request] else work_s + move_s

    def _count(self, request: int, replica: int, sign: float) -> None:
        self.base_s[replica] += sign * self._own_s(request, replica)
        self.used_bytes[replica] += sign * self._columns.memory_bytes[request]

    def _count_adapter(self, adapter: int, replica: int, sign: float) -> None:
        entry_s = self._indexed.entry_s(adapter, replica)
        num_bytes = float(self._indexed.needed[adapter].num_bytes)
        self.base_s[replica] += sign * entry_s
        self.used_bytes[replica] += sign * num_bytes
        self.adapter_bytes[replica] += sign * num_bytes
        if sign > 0.0:
            self._present[replica][adapter] = None
            self._rows.change(adapter, replica, 0.0, 0.0)
        else:
            del self._present[replica][adapter]
            self._rows.change(adapter, replica, entry_s, num_bytes)

    def _refresh(self, request: int) -> None:
        j = self.at[request]
        seconds = self._own_s(request, j)
        num_bytes = float(self._columns.memory_bytes[request])
        for k in self._indexed.adapters_of[request]:
            if len(self._users[k][j]) == 1:
                seconds += self._indexed.entry_s(k, j)
                num_bytes += self._indexed.needed[k].num_bytes
        self.out_s[request] = seconds
        self.out_bytes[request] = num_bytes

    def _refresh_alone(self, adapter: int, replica: int) -> None:
        """Those of whom one may have become, or ceased to be, the only one that needs it."""
        users = self._users[adapter].get(replica, ())
        if len(users) <= 2:
            for request in users:
                self._refresh(request)


class _Rows:
    """[J] seconds and bytes of adapters where no request there needs them yet, else 0.

    Made when they are first asked for; all are dropped when they have become too many.
    """

    def __init__(self, indexed: Indexed) -> None:
        self._indexed = indexed
        self._num_replicas = len(indexed.problem.replicas)
        self._slot = np.full(len(indexed.needed) + 1, -1, dtype=np.int64)
        self._most = max(64, MAX_CACHED // (2 * self._num_replicas))
        self._grid: Floats = np.zeros((2, 64, self._num_replicas))
        self._clear()

    def sums(self, needed: Ints, users: list[dict[int, set[int]]]) -> tuple[Floats, Floats]:
        """[N, J] seconds and bytes, each summed over the adapters `needed` [N, A]."""
        missing = np.unique(needed[self._slot[needed] < 0])
        if len(missing) and self._num_used + len(missing) > self._most:
            self._clear()
            missing = np.unique(needed[self._slot[needed] < 0])
        self._reserve(self._num_used + len(missing))
        for k in missing.tolist():
            self._make(k, users[k])
        slots = self._slot[needed]
        if needed.shape[1] == 1:
            return self._grid[0, slots[:, 0]], self._grid[1, slots[:, 0]]
        return self._grid[0, slots].sum(axis=1), self._grid[1, slots].sum(axis=1)

    def change(self, adapter: int, replica: int, seconds: float, num_bytes: float) -> None:
        slot = self._slot[adapter]
        if slot >= 0:
            self._grid[0, slot, replica] = seconds
            self._grid[1, slot, replica] = num_bytes

    def _clear(self) -> None:
        """Nothing but the row of no adapter, which is 0 everywhere."""
        self._slot[:] = -1
        self._slot[-1] = 0
        self._num_used = 1
        self._grid[:, 0] = 0.0

    def _reserve(self, num_rows: int) -> None:
        if num_rows > self._grid.shape[1]:
            grid: Floats = np.zeros((2, 2 * num_rows, self._num_replicas))
            grid[:, : self._num_used] = self._grid[:, : self._num_used]
            self._grid = grid

    def _make(self, adapter: int, users: dict[int, set[int]]) -> None:
        needed = self._indexed.needed[adapter]
        slot = self._slot[adapter] = self._num_used
        self._num_used += 1
        row = self._grid[:, slot]
        row[0] = needed.share_s + needed.load_s
        row[1] = needed.num_bytes
        for j, seconds in self._indexed.held_s[adapter].items():
            row[0, j] = needed.share_s + seconds
        row[:, list(users)] = 0.0
