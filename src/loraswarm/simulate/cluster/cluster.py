"""One trace through many replicas under one policy: arrivals, steps, decisions, in order of time.

Keeps the ClusterView true as a front would: what was sent, tokens that came, where adapters are.
The policy's router, placement and migration see nothing else. Called by compare.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from loraswarm.cluster.migration.move_costs import MoveCosts
from loraswarm.cluster.migration.problem import Solution
from loraswarm.cluster.placement import LoadForecast, Planner
from loraswarm.cluster.routing import make_router
from loraswarm.cluster.view import (
    ClusterView,
    HeldTier,
    ReplicaLimits,
    ReplicaView,
    RoutedRequest,
)
from loraswarm.core.cost_model import CostFigures, TransferCosts
from loraswarm.errors import ConfigError
from loraswarm.simulate.cluster.events import Events
from loraswarm.simulate.cluster.moving import MESSAGE_S, Moved, Mover
from loraswarm.simulate.cluster.policies import (
    PLACEMENT_PERIOD_S,
    Policy,
    counting_clock,
    make_migration,
)
from loraswarm.simulate.cluster.replica import Replica
from loraswarm.simulate.cluster.rows import SimRequest
from loraswarm.simulate.cluster.traces import BASE, ClusterTrace

FIRST_GUESS_TOKENS = 128.0
LENGTH_MEMORY = 0.98
"""An answer is taken to be as long as those before it were, as the front does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Equal replicas, and what a byte takes between two of them. With `counts_solving`, moves are
    made only when so much time has passed as the solver took."""

    num_replicas: int
    limits: ReplicaLimits
    costs: CostFigures
    link: TransferCosts
    counts_solving: bool = False


@dataclass(slots=True)
class Run:
    """What came of a trace: its requests, in order of arrival, and what was counted."""

    requests: list[SimRequest] = field(default_factory=list)
    moved: Moved = field(default_factory=Moved)
    num_loads: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    busy_s: float = 0.0
    decision_s: float = 0.0
    duration_s: float = 0.0


class Cluster:
    """One run; the surroundings of its replicas.

    Raises   ConfigError for a request that a replica cannot hold, or an adapter.
    """

    def __init__(self, trace: ClusterTrace, setup: Setup, policy: Policy, seed: int = 0) -> None:
        self.costs = setup.costs
        self.found = Run()
        self.replicas: dict[str, Replica] = {}
        self._trace, self._setup, self._policy = trace, setup, policy
        require_fit(trace, setup.limits)
        self._bytes = dict[str, int](zip(trace.names, trace.num_bytes.tolist(), strict=True))
        self._events = Events()
        self.view = ClusterView(setup.costs, self._bytes)
        self._router = make_router(policy.router, seed)
        self._move_costs = MoveCosts(setup.costs, setup.link, MESSAGE_S)
        self._mover = Mover(self._events, self.replicas, setup.link, self._move_costs)
        self._plan_moves = make_migration(policy, self._move_costs)
        self._forecast = LoadForecast()
        self._planner = Planner(clock=counting_clock())
        self._open: dict[str, SimRequest] = {}
        self._held: deque[SimRequest] = deque()
        self._awake: dict[str, None] = {}
        self._num_ended = 0
        self._num_seen = 0
        self._mean_tokens = FIRST_GUESS_TOKENS
        self._add_replicas(seed)

    def run(self, check: Callable[[Cluster], None] | None = None) -> Run:
        """Serve every request to its end; `check` is called whenever time is about to pass."""
        events = self._events
        self._arrive_from(0)
        if self._policy.migration is not None:
            events.after(self._policy.migration_period_s, self._migrate)
        if self._policy.has_placement:
            events.after(PLACEMENT_PERIOD_S, self._place)
        while events.next_s is not None:
            events.happen()
            self._begin_steps()
            if check is not None:
                check(self)
        assert self._is_over(), "requests are open but nothing will happen"
        return self._sum_up()

    def now_s(self) -> float:
        return self._events.now_s

    def bytes_of(self, adapter: str) -> int:
        return self._bytes[adapter]

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._events.after(seconds, action)

    def set_tier(self, replica_id: str, adapter: str, tier: HeldTier | None) -> None:
        self.view.set_tier(replica_id, adapter, tier)

    def wake(self, replica_id: str) -> None:
        self._awake[replica_id] = None

    def open_requests(self) -> list[SimRequest]:
        """Those that have come and not ended."""
        return list(self._open.values())

    def _add_replicas(self, seed: int) -> None:
        """Every adapter is on one replica, by turns, and one of them on all, as dLoRA begins; in
        pages as far as there is room."""
        for place in range(self._setup.num_replicas):
            view = ReplicaView(f"r{place}", self._setup.limits)
            self.view.replicas[view.replica_id] = view
            self.replicas[view.replica_id] = Replica(view, self, self._ended)
        replicas, names = list(self.replicas.values()), self._trace.names
        for replica in replicas if names else ():
            replica.stock.begin_with(names[seed % len(names)])
        for place, name in enumerate(names):
            replicas[place % len(replicas)].stock.begin_with(name)

    def _begin_steps(self) -> None:
        awake, self._awake = self._awake, {}
        for replica_id in awake:
            replica = self.replicas[replica_id]
            seconds = None if replica.is_stepping else replica.plan()
            if seconds is not None:
                self._events.after(seconds, partial(self._finish_step, replica))

    def _finish_step(self, replica: Replica) -> None:
        replica.finish(self.now_s())
        self._route_held()

    def _arrive_from(self, row: int) -> None:
        """Row by row, so that the heap has one arrival."""
        if row < self._trace.num_requests:
            self._events.at(float(self._trace.arrivals_s[row]), partial(self._arrive, row))

    def _arrive(self, row: int) -> None:
        trace = self._trace
        adapter = int(trace.adapters[row])
        names = () if adapter == BASE else (trace.names[adapter],)
        prompt_tokens = int(trace.prompts[row])
        routed = RoutedRequest(
            request_id=str(row),
            adapters=names,
            prompt_tokens=prompt_tokens,
            expected_tokens=max(1, round(self._mean_tokens)),
            prefill_tokens=prompt_tokens,
            arrived_s=self.now_s(),
        )
        request = SimRequest(
            routed=routed,
            order=row,
            num_bytes=0 if adapter == BASE else int(trace.num_bytes[adapter]),
            prompt_tokens=prompt_tokens,
            output_tokens=int(trace.outputs[row]),
            arrival_s=self.now_s(),
        )
        self.found.requests.append(request)
        self._open[request.request_id] = request
        self._forecast.saw(names, prompt_tokens, routed.expected_tokens)
        if self._held or not self._route(request):
            self._held.append(request)
        self._arrive_from(row + 1)

    def _route(self, request: SimRequest) -> bool:
        """Send it to where the policy says; False if that is nowhere."""
        self.view.now_s = self.now_s()
        begin_s = time.perf_counter()
        replica_id = self._router.route(request.routed, self.view)
        self.found.decision_s += time.perf_counter() - begin_s
        if replica_id is None:
            return False
        replica = self.replicas[replica_id]
        replica.view.add(request.routed)
        replica.receive(request)
        return True

    def _route_held(self) -> None:
        """In order of arrival, after each that has ended."""
        if self._num_ended == self._num_seen:
            return
        self._num_seen = self._num_ended
        while self._held and self._route(self._held[0]):
            self._held.popleft()

    def _ended(self, request: SimRequest) -> None:
        self.view.replicas[request.replica_id].remove(request.request_id)
        del self._open[request.request_id]
        new = (1.0 - LENGTH_MEMORY) * request.num_given
        self._mean_tokens = LENGTH_MEMORY * self._mean_tokens + new
        self._num_ended += 1

    def _is_over(self) -> bool:
        return not self._open and len(self.found.requests) == self._trace.num_requests

    def _migrate(self) -> None:
        """Ask for moves, make them, and again after a while."""
        if self._is_over():
            return
        for replica in self.replicas.values():
            replica.rows.tell()
        self.view.now_s = self.now_s()
        begin_s = time.perf_counter()
        solution = self._plan_moves(self.view)
        seconds = time.perf_counter() - begin_s
        self.found.decision_s += seconds
        if solution is not None:
            delay_s = seconds if self._setup.counts_solving else 0.0
            self._events.after(delay_s, partial(self._make_moves, solution))
        self._events.after(self._policy.migration_period_s, self._migrate)

    def _make_moves(self, solution: Solution) -> None:
        for move in solution.moves:
            request = self._open.get(move.request_id)
            if request is not None:
                self._mover.begin(move, request)

    def _place(self) -> None:
        if self._is_over():
            return
        self.view.now_s = self.now_s()
        begin_s = time.perf_counter()
        self._forecast.advance(self.now_s())
        plan = self._planner.plan(self.view, self._forecast.rates())
        self.found.decision_s += time.perf_counter() - begin_s
        for each in plan.prefetches:
            self.replicas[each.replica_id].stock.prefetch(each.adapter)
        self._events.after(PLACEMENT_PERIOD_S, self._place)

    def _sum_up(self) -> Run:
        found, replicas = self.found, self.replicas.values()
        found.moved = self._mover.moved
        found.num_loads = sum(each.stock.num_loads for each in replicas)
        found.num_preemptions = sum(each.num_preemptions for each in replicas)
        found.num_steps = sum(each.num_steps for each in replicas)
        found.busy_s = sum(each.busy_s for each in replicas)
        found.duration_s = max(each.end_s for each in found.requests)
        return found


def require_fit(trace: ClusterTrace, limits: ReplicaLimits) -> None:
    """Raises ConfigError naming what is too large."""
    tokens = trace.prompts + trace.outputs
    longest = int(tokens.max())
    largest = int(trace.num_bytes.max()) if len(trace.num_bytes) else 0
    room = limits.num_pages - -(-largest // limits.page_bytes)
    if longest + 1 > room * limits.page_tokens:
        raise ConfigError(
            f"trace {trace.name} has a request of {longest:,} tokens; a simulated replica holds"
            f" {max(0, room * limits.page_tokens - 1):,} beside its adapter (--pool)"
        )
    if largest > limits.host_bytes:
        raise ConfigError(
            f"an adapter takes {largest:,} bytes; a simulated replica's host memory has"
            f" {limits.host_bytes:,} (--host-cache)"
        )
