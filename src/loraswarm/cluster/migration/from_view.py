"""From a cluster's view to moves: when to solve, what, and whether the answer is worth it.

Estimates seconds from measured figures; knows no solver but by its protocol, and moves nothing.
Called every few seconds by the front and by the simulator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from loraswarm.cluster.migration.move_costs import MoveCosts, prefill_token_s
from loraswarm.cluster.migration.problem import (
    MigrationProblem,
    NeededAdapter,
    OpenRequest,
    ReplicaRoom,
    Solution,
    Solver,
)
from loraswarm.cluster.view import ClusterView, HeldTier, ReplicaView, RoutedRequest
from loraswarm.core.cost_model import CostFigures
from loraswarm.core.step_cost import ChunkWork, StepWork

Imbalance = Literal["memory", "queue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationOptions:
    """When an imbalance is worth a solve, and a solution its moves.

    Memory is unbalanced if a pool is filled to `full_share` and another `fill_difference` less.
    Queues are if more requests are open on a replica than can run, and another is idle: it has less
    open than `idle_share` of its seats, and less per seat by `queue_difference`. Where all are busy
    evening them out only delays short requests (docs/cluster_simulator.md). Moves are made if the
    objective falls by `least_gain_share` of it at least: estimates are no better. `adapter_share`
    of a pool may be adapters in use.
    """

    full_share: float = 0.9
    fill_difference: float = 0.2
    queue_difference: float = 1.0
    idle_share: float = 0.25
    least_gain_share: float = 0.05
    adapter_share: float = 0.5
    time_limit_s: float = 0.012

    def __post_init__(self) -> None:
        shares = ("full_share", "fill_difference", "queue_difference", "idle_share")
        for name in (*shares, "least_gain_share"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0.0 < self.adapter_share <= 1.0:
            raise ValueError(f"adapter_share is {self.adapter_share}; it must be in (0, 1]")


class MigrationPlanner:
    """Asks `solver` when load is unbalanced, and keeps only moves that gain more than they cost."""

    def __init__(
        self, solver: Solver, costs: MoveCosts, options: MigrationOptions | None = None
    ) -> None:
        self._solver = solver
        self._costs = costs
        self._options = options or MigrationOptions()

    def problem(self, view: ClusterView) -> MigrationProblem | None:
        """What to solve now; None if load is balanced well enough. Later changes of the view do
        not change it, so that it may be solved on another thread."""
        if imbalance_of(view, self._options) is None:
            return None
        return problem_of(view, self._costs, self._options.adapter_share)

    def worthwhile(self, solution: Solution) -> Solution | None:
        """The solution, if its moves gain enough."""
        least_s = self._options.least_gain_share * solution.before.objective_s
        is_worth = bool(solution.moves) and solution.gain_s > least_s
        return solution if is_worth else None

    def plan(self, view: ClusterView) -> Solution | None:
        """Moves to make now, or None. Solves on the caller's thread."""
        problem = self.problem(view)
        if problem is None:
            return None
        return self.worthwhile(self._solver.solve(problem, self._options.time_limit_s))


def imbalance_of(view: ClusterView, options: MigrationOptions) -> Imbalance | None:
    """What is unbalanced, from sums that the view keeps; O(replicas)."""
    open_to = [replica for replica in view.replicas.values() if replica.accepts]
    if not open_to:
        return None
    fills = {each.replica_id: _fill(each, view) for each in view.replicas.values()}
    least_fill = min(fills[each.replica_id] for each in open_to)
    fullest = max(fills.values())
    if fullest >= options.full_share and fullest - least_fill >= options.fill_difference:
        return "memory"
    longest = max(_requests_per_seat(each) for each in view.replicas.values())
    shortest = min(_requests_per_seat(each) for each in open_to)
    is_idle = shortest < options.idle_share
    if longest > 1.0 and is_idle and longest - shortest >= options.queue_difference:
        return "queue"
    return None


def problem_of(view: ClusterView, costs: MoveCosts, adapter_share: float = 0.5) -> MigrationProblem:
    """All open requests and replicas, in seconds and bytes.

    A request's work is what it needs of steps as full as replicas can have them: seats, or as many
    rows as their pools hold of the requests that are open. Its memory is what it will have taken
    half way to its expected end.

    Raises   ValueError if the view has no replica, KeyError naming an adapter without bytes.
    """
    estimate = _Estimate(view, costs)
    requests = [
        estimate.request(replica, request)
        for replica in view.replicas.values()
        for request in replica.requests.values()
    ]
    adapters = estimate.adapters()
    tiers = _tiers(view, adapters)
    replicas = [
        ReplicaRoom(
            replica_id=replica.replica_id,
            pool_bytes=_pool_bytes(replica),
            adapter_bytes=round(adapter_share * _pool_bytes(replica)),
            accepts=replica.accepts,
            tiers=tiers.get(replica.replica_id, {}),
        )
        for replica in view.replicas.values()
    ]
    return MigrationProblem(
        requests=tuple(requests),
        replicas=tuple(replicas),
        adapters=adapters,
        overflow_byte_s=estimate.prefill_token_s / max(1, view.costs.kv_token_bytes),
    )


class _Estimate:
    """Seconds of requests and adapters, from a view's figures."""

    def __init__(self, view: ClusterView, costs: MoveCosts) -> None:
        self._view = view
        self._costs = costs
        replicas = list(view.replicas.values())
        step_tokens = min((each.limits.max_step_tokens for each in replicas), default=1)
        self.prefill_token_s = prefill_token_s(view.costs, max(1, step_tokens))
        self._row_s = _row_s(view.costs, _full_rows(replicas))

    def request(self, replica: ReplicaView, request: RoutedRequest) -> OpenRequest:
        """A request without K and V moves by a message alone."""
        num_held = max(0, request.context_tokens - request.prefill_tokens)
        pages = replica.pages_for(request.context_tokens + request.tokens_left // 2)
        held_bytes = replica.pages_for(num_held) * replica.limits.page_bytes
        return OpenRequest(
            request_id=request.request_id,
            replica_id=replica.replica_id,
            adapters=request.adapters,
            work_s=self._work_s(request),
            memory_bytes=pages * replica.limits.page_bytes,
            kv_move_s=self._costs.kv_s(held_bytes),
            prefill_move_s=self._costs.prefill_s(num_held),
        )

    def adapters(self) -> dict[str, NeededAdapter]:
        """Those of open requests; a replica reads one in as many steps as a request of it has left
        on average, as its requests run side by side."""
        num_requests: dict[str, int] = {}
        steps: dict[str, int] = {}
        for replica in self._view.replicas.values():
            for request in replica.requests.values():
                for name in request.adapters:
                    num_requests[name] = num_requests.get(name, 0) + 1
                    steps[name] = steps.get(name, 0) + request.tokens_left
        return {
            name: self._adapter(name, steps[name] / count) for name, count in num_requests.items()
        }

    def _adapter(self, name: str, num_steps: float) -> NeededAdapter:
        figures, num_bytes = self._view.costs, self._view.adapter_bytes[name]
        step_s = figures.step.adapter_s + figures.step.tile_byte_s * num_bytes
        copy_s = figures.copy_s(num_bytes)
        return NeededAdapter(
            name=name,
            num_bytes=num_bytes,
            share_s=num_steps * step_s,
            copy_s=copy_s,
            load_s=figures.load_s(num_bytes) + copy_s,
        )

    def _work_s(self, request: RoutedRequest) -> float:
        step, sizes = self._view.costs.step, self._view.adapter_bytes
        own_bytes = sum(sizes[name] for name in request.adapters)
        adapted_s = step.lora_product_s * own_bytes
        if request.adapters:
            adapted_s += step.adapted_token_s
        half_way = request.context_tokens + request.tokens_left / 2
        read_s = step.kv_byte_s * self._view.costs.kv_token_bytes * half_way
        decode_s = request.tokens_left * (self._row_s + adapted_s + read_s)
        return decode_s + request.prefill_tokens * (self.prefill_token_s + adapted_s)


def _row_s(figures: CostFigures, num_rows: int) -> float:
    """Seconds of a row of the base in a decode step of so many, without its K and V."""
    row = ChunkWork(num_tokens=1, num_computed=0)
    return figures.step_s(StepWork.of([row] * num_rows, 0)) / num_rows


def _full_rows(replicas: Iterable[ReplicaView]) -> int:
    """How many rows a step has where all seats or the pool are taken: least of all replicas."""
    open_tokens = num_open = 0
    rows: list[int] = []
    for replica in replicas:
        open_tokens += replica.context_tokens + replica.tokens_left // 2
        num_open += replica.num_requests
    mean_tokens = max(1.0, open_tokens / max(1, num_open))
    for replica in replicas:
        held = replica.limits.num_pages * replica.limits.page_tokens / mean_tokens
        rows.append(max(1, min(replica.limits.num_seats, int(held))))
    return min(rows, default=1)


def _tiers(view: ClusterView, adapters: Iterable[str]) -> Mapping[str, dict[str, HeldTier]]:
    """By replica, where it has the adapters that are needed: copies, as the view goes on."""
    tiers: dict[str, dict[str, HeldTier]] = {}
    for name in adapters:
        for replica_id in view.holders.get(name, ()):
            tier = view.replicas[replica_id].tiers[name]
            tiers.setdefault(replica_id, {})[name] = tier
    return tiers


def _pool_bytes(replica: ReplicaView) -> int:
    return replica.limits.num_pages * replica.limits.page_bytes


def _fill(replica: ReplicaView, view: ClusterView) -> float:
    """The share of its pool that the K and V and the adapters of what is open on it take."""
    num_bytes = replica.pages_for(replica.context_tokens) * replica.limits.page_bytes
    num_bytes += sum(view.adapter_bytes[name] for name in replica.num_requests_of)
    return num_bytes / max(1, _pool_bytes(replica))


def _requests_per_seat(replica: ReplicaView) -> float:
    return replica.num_requests / max(1, replica.limits.num_seats)
