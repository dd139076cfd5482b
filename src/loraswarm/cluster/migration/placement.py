"""A placement that is changed request by request, and what each change would cost.

The objective's terms, kept with every move (`objective` defines them; a test compares). Rows over
all replicas are numpy arrays, as a search asks for them by the thousand. Used by `greedy` alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loraswarm.cluster.migration.objective import MEAN_WEIGHT, Indexed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_CACHED = 4_000_000
"""Numbers in rows of adapters that are kept."""


class Placement:
    """Where each request is (`at`), who is on each replica, and their loads.

    `base_s` are loads without what overflows; `used_bytes` are of K, V and adapters, those of
    adapters alone are `adapter_bytes`. `out_s` and `out_bytes` are, for each request, what its
    replica is rid of without it, but for overflow.
    """

    def __init__(self, indexed: Indexed) -> None:
        problem = indexed.problem
        num_replicas, num_requests = len(problem.replicas), len(problem.requests)
        self._indexed = indexed
        self.num_replicas = num_replicas
        self.home = indexed.home
        self.at = list(indexed.home)
        self.members: list[dict[int, None]] = [{} for _ in range(num_replicas)]
        self.work_s = [request.work_s for request in problem.requests]
        self.move_s = [request.move_s for request in problem.requests]
        self.memory_bytes = [request.memory_bytes for request in problem.requests]
        self.accepts = np.array([room.accepts for room in problem.replicas])
        self.base_s: Floats = np.zeros(num_replicas)
        self.used_bytes: Floats = np.zeros(num_replicas)
        self.adapter_bytes: Floats = np.zeros(num_replicas)
        self.out_s: Floats = np.zeros(num_requests)
        self.out_bytes: Floats = np.zeros(num_requests)
        self._pool: Floats = np.array([float(room.pool_bytes) for room in problem.replicas])
        self._limit: Floats = np.array([float(each) for each in indexed.limit_bytes])
        self._users: list[dict[int, set[int]]] = [{} for _ in indexed.names]
        self._present: list[dict[int, None]] = [{} for _ in range(num_replicas)]
        self._fill_columns()
        self._rows: dict[int, Floats] = {}
        for i, j in enumerate(self.at):
            self._enter(i, j)
        for i in range(num_requests):
            self._refresh(i)

    def loads_s(self) -> Floats:
        return self.base_s + self.overflow_s(self.used_bytes)

    def load_s(self, replica: int) -> float:
        over = max(0.0, float(self.used_bytes[replica] - self._pool[replica]))
        return float(self.base_s[replica]) + self._indexed.problem.overflow_byte_s * over

    def load_without_s(self, replica: int, requests: Ints) -> Floats:
        """The replica's load without each of these, which are on it."""
        used_bytes = self.used_bytes[replica] - self.out_bytes[requests]
        base_s: Floats = self.base_s[replica] - self.out_s[requests]
        return base_s + self.overflow_s(used_bytes, replica)

    def overflow_s(self, used_bytes: Floats, replica: int | None = None) -> Floats:
        """Seconds of overflow if so many bytes are used: [..., J], or of one replica."""
        pool = self._pool if replica is None else self._pool[replica]
        over_s: Floats = self._indexed.problem.overflow_byte_s * np.maximum(used_bytes - pool, 0.0)
        return over_s

    def overflow_at_s(self, used_bytes: Floats, replicas: Ints) -> Floats:
        """The same where the last axis is that of `replicas`."""
        over = np.maximum(used_bytes - self._pool[replicas], 0.0)
        over_s: Floats = self._indexed.problem.overflow_byte_s * over
        return over_s

    def objective_s(self) -> float:
        loads = self.loads_s()
        return float(loads.max()) + MEAN_WEIGHT * float(loads.sum()) / self.num_replicas

    def entries(self, request: int) -> tuple[Floats, Floats]:
        """[J] seconds and bytes by which each replica's `base_s` and `used_bytes` would grow.

        Seconds are infinite where it may not come: the replica does not accept, or has no room for
        its adapters. Where it is now is of no meaning.
        """
        seconds = np.full(self.num_replicas, self.work_s[request] + self.move_s[request])
        home = self.home[request]
        seconds[home] = self.work_s[request]
        new_bytes = np.zeros(self.num_replicas)
        for k in self._indexed.adapters_of[request]:
            row = self._row(k)
            seconds += row[0]
            new_bytes += row[1]
        is_closed = ~self.accepts
        is_closed[home] = False
        has_room = (self.adapter_bytes + new_bytes <= self._limit) | (new_bytes == 0.0)
        seconds[is_closed | ~has_room] = np.inf
        return seconds, new_bytes + self.memory_bytes[request]

    def entries_at(self, replica: int, requests: Ints) -> tuple[Floats, Floats]:
        """The same for one replica and each of some requests; room for adapters is not asked."""
        seconds = self._entry_s.copy()
        for k, entry_s in self._held_at[replica]:
            seconds[k] = entry_s
        num_bytes = self._entry_bytes.copy()
        present = list(self._present[replica])
        seconds[present] = 0.0
        num_bytes[present] = 0.0
        needed = self._needed[requests]
        is_home = self._home[requests] == replica
        in_s = self._work_s[requests] + np.where(is_home, 0.0, self._move_s[requests])
        in_s += seconds[needed].sum(axis=1)
        if not self.accepts[replica]:
            in_s[~is_home] = np.inf
        return in_s, self._memory_bytes[requests] + num_bytes[needed].sum(axis=1)

    def move(self, request: int, target: int) -> None:
        source = self.at[request]
        adapters = self._indexed.adapters_of[request]
        self._leave(request, source)
        self._enter(request, target)
        self.at[request] = target
        self._refresh(request)
        for k in adapters:
            self._refresh_alone(k, source)
            self._refresh_alone(k, target)

    def fits(self, replica: int) -> bool:
        """Whether its adapters are within its limit."""
        return bool(self.adapter_bytes[replica] <= self._limit[replica])

    def _fill_columns(self) -> None:
        """What `entries_at` reads; the last adapter is none, for requests that need fewer."""
        indexed = self._indexed
        needed = [indexed.problem.adapters[name] for name in indexed.names]
        self._entry_s: Floats = np.array([*(each.share_s + each.load_s for each in needed), 0.0])
        self._entry_bytes: Floats = np.array([*(float(each.num_bytes) for each in needed), 0.0])
        self._held_at: list[list[tuple[int, float]]] = [[] for _ in range(self.num_replicas)]
        for k, held in enumerate(indexed.held_s):
            for j, seconds in held.items():
                self._held_at[j].append((k, needed[k].share_s + seconds))
        width = max((len(adapters) for adapters in indexed.adapters_of), default=0)
        none = len(needed)
        padded = [(*each, *[none] * (width - len(each))) for each in indexed.adapters_of]
        self._needed: Ints = np.array(padded, dtype=np.int64).reshape(len(padded), width)
        self._home: Ints = np.array(indexed.home, dtype=np.int64)
        self._work_s: Floats = np.array(self.work_s)
        self._move_s: Floats = np.array(self.move_s)
        self._memory_bytes: Floats = np.array(self.memory_bytes, dtype=np.float64)

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

    def _count(self, request: int, replica: int, sign: float) -> None:
        moved_s = 0.0 if replica == self.home[request] else self.move_s[request]
        self.base_s[replica] += sign * (self.work_s[request] + moved_s)
        self.used_bytes[replica] += sign * self.memory_bytes[request]

    def _count_adapter(self, adapter: int, replica: int, sign: float) -> None:
        entry_s = self._indexed.entry_s(adapter, replica)
        num_bytes = self._indexed.adapter_bytes[adapter]
        self.base_s[replica] += sign * entry_s
        self.used_bytes[replica] += sign * num_bytes
        self.adapter_bytes[replica] += sign * num_bytes
        if sign > 0.0:
            self._present[replica][adapter] = None
        else:
            del self._present[replica][adapter]
        if adapter in self._rows:
            self._rows[adapter][:, replica] = (0.0, 0.0) if sign > 0.0 else (entry_s, num_bytes)

    def _row(self, adapter: int) -> Floats:
        """[2, J] seconds and bytes of the adapter where no request there needs it, else 0."""
        row = self._rows.get(adapter)
        if row is None:
            if 2 * self.num_replicas * len(self._rows) > MAX_CACHED:
                self._rows.clear()
            row = self._rows[adapter] = self._make_row(adapter)
        return row

    def _make_row(self, adapter: int) -> Floats:
        needed = self._indexed.problem.adapters[self._indexed.names[adapter]]
        row = np.empty((2, self.num_replicas))
        row[0] = needed.share_s + needed.load_s
        row[1] = needed.num_bytes
        for j, seconds in self._indexed.held_s[adapter].items():
            row[0, j] = needed.share_s + seconds
        row[:, list(self._users[adapter])] = 0.0
        return row

    def _refresh(self, request: int) -> None:
        j = self.at[request]
        seconds = self.work_s[request] + (self.move_s[request] if j != self.home[request] else 0.0)
        num_bytes = self.memory_bytes[request]
        for k in self._indexed.adapters_of[request]:
            if len(self._users[k][j]) == 1:
                seconds += self._indexed.entry_s(k, j)
                num_bytes += self._indexed.adapter_bytes[k]
        self.out_s[request] = seconds
        self.out_bytes[request] = num_bytes

    def _refresh_alone(self, adapter: int, replica: int) -> None:
        """Those of whom one may have become, or ceased to be, the only one that needs it."""
        users = self._users[adapter].get(replica, ())
        if len(users) <= 2:
            for request in users:
                self._refresh(request)
