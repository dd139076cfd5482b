"""What a solver of migration is given and what it answers: plain data in seconds and bytes.

Knows neither figures of a machine nor a cluster's view; `from_view` makes problems of those. Used
by the solvers, the simulator and whoever carries out the moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from loraswarm.cluster.view import HeldTier

How = Literal["kv", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """A request that is open on a replica.

    `work_s` are the seconds of full steps that it still needs anywhere. `memory_bytes` are what
    its K and V take of a pool. A move costs its target `kv_move_s` if K and V are sent, or
    `prefill_move_s` if they are computed again; a solver takes the cheaper.
    """

    request_id: str
    replica_id: str
    adapters: tuple[str, ...]
    work_s: float
    memory_bytes: int
    kv_move_s: float
    prefill_move_s: float

    @property
    def how(self) -> How:
        """The cheaper way to move it; computing again, which sends less, if they are equal."""
        return "kv" if self.kv_move_s < self.prefill_move_s else "prefill"

    @property
    def move_s(self) -> float:
        return min(self.kv_move_s, self.prefill_move_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeededAdapter:
    """An adapter of some open request: `num_bytes` in pages.

    A replica that serves any request of it spends `share_s`, beside the requests' own work, and
    `load_s` if it has to be brought from its store, `copy_s` if it is in host memory.
    """

    name: str
    num_bytes: int
    share_s: float
    load_s: float
    copy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRoom:
    """A replica: bytes of its pool, how many of them adapters in use may take, what it holds.

    If it does not accept, its requests may leave and none may come. `tiers` need have no adapters
    but those of the problem.
    """

    replica_id: str
    pool_bytes: int
    adapter_bytes: int
    accepts: bool = True
    tiers: Mapping[str, HeldTier] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationProblem:
    """Requests, where they are, and the replicas that they could be on.

    `overflow_byte_s` are the seconds that a byte costs that a replica's pool has no room for.

    Raises   ValueError naming the request, adapter or replica, and the field: an id twice, a name
             that is not there, a negative or infinite number.
    """

    requests: tuple[OpenRequest, ...]
    replicas: tuple[ReplicaRoom, ...]
    adapters: Mapping[str, NeededAdapter]
    overflow_byte_s: float

    def __post_init__(self) -> None:
        if not self.replicas:
            raise ValueError("a migration problem needs at least one replica")
        _check_numbers("the problem", (("overflow_byte_s", self.overflow_byte_s),))
        known = _check_unique("replica", (each.replica_id for each in self.replicas))
        _check_unique("request", (each.request_id for each in self.requests))
        for room in self.replicas:
            numbers = (("pool_bytes", room.pool_bytes), ("adapter_bytes", room.adapter_bytes))
            _check_numbers(f"replica {room.replica_id!r}", numbers)
        for name, adapter in self.adapters.items():
            _check_adapter(name, adapter)
        for request in self.requests:
            _check_request(request, known, self.adapters)


@dataclass(frozen=True, slots=True)
class Move:
    """`request_id` leaves `source` for `target`, with its K and V or to be computed again there."""

    request_id: str
    source: str
    target: str
    how: How


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """`replica_id` has to bring `adapter` to its pages for requests that come with it."""

    adapter: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class Objective:
    """What a placement is worth; `loads_s` by the problem's order of replicas."""

    loads_s: tuple[float, ...]
    makespan_s: float
    mean_s: float
    objective_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Moves, and what they lead to.

    `lower_bound_s` is an objective that no placement is below, as far as the solver can tell.
    `is_optimal`: the solver has proved that there is none better than this one.
    """

    moves: tuple[Move, ...]
    adapter_loads: tuple[AdapterLoad, ...]
    before: Objective
    after: Objective
    lower_bound_s: float
    seconds: float
    is_optimal: bool = False

    @property
    def gain_s(self) -> float:
        """By how much the objective falls, the cost of the moves included."""
        return self.before.objective_s - self.after.objective_s

    @property
    def gap(self) -> float:
        """How far the objective is above the bound at most, as a share of the bound."""
        if self.lower_bound_s <= 0.0:
            return 0.0 if self.after.objective_s <= 0.0 else math.inf
        return max(0.0, self.after.objective_s / self.lower_bound_s - 1.0)


class Solver(Protocol):
    """Finds moves. Never makes a replica's adapters exceed their bytes, nor exceed them further."""

    def solve(self, problem: MigrationProblem, time_limit_s: float) -> Solution: ...


def _check_unique(what: str, ids: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    for each in ids:
        if each in seen:
            raise ValueError(f"{what} {each!r} is there twice")
        seen.add(each)
    return seen


def _check_request(
    request: OpenRequest, known: set[str], adapters: Mapping[str, NeededAdapter]
) -> None:
    if request.replica_id not in known:
        raise ValueError(
            f"request {request.request_id!r} is on {request.replica_id!r}, which is no replica"
        )
    names = request.adapters
    if len(names) > 1 and len(set(names)) != len(names):
        raise ValueError(f"request {request.request_id!r} names an adapter twice: {names}")
    for name in names:
        if name not in adapters:
            raise ValueError(f"request {request.request_id!r} needs the unknown adapter {name!r}")
    total = request.work_s + request.memory_bytes + request.kv_move_s + request.prefill_move_s
    least = min(request.work_s, request.memory_bytes, request.kv_move_s, request.prefill_move_s)
    if not (least >= 0.0 and total < math.inf):
        numbers = ("work_s", "memory_bytes", "kv_move_s", "prefill_move_s")
        pairs = tuple((name, getattr(request, name)) for name in numbers)
        _check_numbers(f"request {request.request_id!r}", pairs)


def _check_adapter(name: str, adapter: NeededAdapter) -> None:
    if adapter.name != name:
        raise ValueError(f"adapter {adapter.name!r} is listed as {name!r}")
    numbers = ("num_bytes", "share_s", "load_s", "copy_s")
    _check_numbers(f"adapter {name!r}", tuple((each, getattr(adapter, each)) for each in numbers))


def _check_numbers(what: str, pairs: Iterable[tuple[str, float]]) -> None:
    for name, value in pairs:
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} of {what} is {value}; it must be finite and not negative")
