"""A whole cluster: the front, what it knows, and what decides for it. Made by the command `serve`.

Joins parts that do not know each other: reports keep the view, the router and the planners read it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from loraswarm.cluster.controller import Controller, Duties, Solve
from loraswarm.cluster.front import ClusterClient, FrontOptions
from loraswarm.cluster.migration.from_view import MigrationOptions, MigrationPlanner
from loraswarm.cluster.migration.greedy import Greedy
from loraswarm.cluster.migration.move_costs import MoveCosts
from loraswarm.cluster.migration.problem import Move, Solver
from loraswarm.cluster.open_requests import Pause
from loraswarm.cluster.placement.planner import Planner, Prefetch
from loraswarm.cluster.plausible_costs import plausible_costs
from loraswarm.cluster.replicas import Replica, StartReplica
from loraswarm.cluster.routing import make_router
from loraswarm.cluster.scaling import Autoscaler, ScalingRules
from loraswarm.cluster.view import ClusterView, ReplicaView
from loraswarm.config import ClusterConfig, EngineConfig
from loraswarm.core.client import AdapterSummary, EngineInfo
from loraswarm.core.cost_model import CostFigures

UNKNOWN_ADAPTER_BYTES = 1 << 20
NO_ENGINE = EngineInfo(
    model="",
    model_path="",
    max_model_len=1,
    vocab_size=1,
    end_token_ids=(),
    weight_bytes=0,
    num_pages=1,
    page_bytes=1,
    page_tokens=1,
)


class AdapterBytes(Mapping[str, int]):
    """What adapters take, by the size of their files at any replica that knows it; one that is not
    known is taken for small. May be read on another thread."""

    def __init__(
        self, adapters: Mapping[str, AdapterSummary], replicas: Mapping[str, Replica]
    ) -> None:
        self._adapters = adapters
        self._replicas = replicas

    def __getitem__(self, name: str) -> int:
        for replica in tuple(self._replicas.values()):
            summary = replica.adapters.get(name)
            if summary is not None and summary.num_bytes:
                return summary.num_bytes
        return UNKNOWN_ADAPTER_BYTES

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


class Cluster:
    """`client` is what a server serves; the controller works beside it from `open` to `close`."""

    def __init__(self, start: StartReplica, engine: EngineConfig, config: ClusterConfig) -> None:
        """Raises ConfigError for a router or a cost model that there is not."""
        self._figures = None if engine.cost_model is None else CostFigures.read(engine.cost_model)
        self._config = config
        self._start = start
        self._seed = engine.seed
        self._router = make_router(config.router, engine.seed or 0)
        self._controller: Controller | None = None
        self._client: ClusterClient | None = None

    @property
    def client(self) -> ClusterClient:
        assert self._client is not None, "not opened yet"
        return self._client

    async def open(self) -> ClusterClient:
        """Start the replicas and begin to decide. Raises ConfigError or EngineError."""
        view = ClusterView(self._figures or plausible_costs(NO_ENGINE), {})
        options = FrontOptions(
            num_replicas=self._config.num_replicas,
            is_one_machine=self._config.ray_address is None,
            seed=self._seed,
        )
        client = self._client = ClusterClient(self._start, self._router, view, options)
        view.adapter_bytes = AdapterBytes(client.adapters, client.fleet.replicas)
        await client.open()
        if self._figures is None:
            view.costs = plausible_costs(client.info)
        self._controller = Controller(client, self._duties(client))
        self._controller.start()
        return client

    async def close(self) -> None:
        """End all. Safe to call twice, and after a failed `open`."""
        if self._controller is not None:
            await self._controller.close()
        if self._client is not None:
            await self._client.close()

    def _duties(self, client: ClusterClient) -> Duties:
        config = self._config
        rules = ScalingRules(min_replicas=config.least_replicas, max_replicas=config.most_replicas)
        moves = MovePlans(client.view, Greedy())
        client.requests.on_pause = moves.saw_pause
        placement = PlacementPlans(client)
        return Duties(
            moves=moves.plan,
            prefetches=placement.plan,
            scaling=Autoscaler(rules) if rules.min_replicas < rules.max_replicas else None,
        )


class MovePlans:
    """Problems of migration from the view, and the moves that are worth it."""

    def __init__(self, view: ClusterView, solver: Solver) -> None:
        options = MigrationOptions()
        self._solver = solver
        self._time_limit_s = options.time_limit_s
        self._kv_token_bytes = view.costs.kv_token_bytes
        self._move_costs = MoveCosts(view.costs)
        self._planner = MigrationPlanner(solver, self._move_costs, options)

    def saw_pause(self, pause: Pause, seconds: float) -> None:
        """A move has cost a client so long; later ones take the way that is shorter by that."""
        if pause.with_kv:
            self._move_costs.saw_kv(pause.num_tokens * max(1, self._kv_token_bytes), seconds)
        else:
            self._move_costs.saw_prefill(pause.num_tokens, seconds)

    def plan(self, view: ClusterView) -> Solve[Sequence[Move]] | None:
        """See controller.PlanMoves."""
        problem = self._planner.problem(view)
        if problem is None:
            return None

        def solve() -> Sequence[Move]:
            solution = self._solver.solve(problem, self._time_limit_s)
            worth = self._planner.worthwhile(solution)
            return () if worth is None else worth.moves

        return solve


class PlacementPlans:
    """Prefetches from the forecast that the front has made of its requests."""

    def __init__(self, client: ClusterClient) -> None:
        self._client = client
        self._planner = Planner()

    def plan(self, view: ClusterView) -> Solve[Sequence[Prefetch]] | None:
        """See controller.PlanPrefetches."""
        forecast = self._client.forecast
        forecast.advance(asyncio.get_running_loop().time())
        rates = forecast.rates()
        if not rates.names:
            return None
        seen = _copy(view)
        return lambda: self._planner.plan(seen, rates).prefetches


def _copy(view: ClusterView) -> ClusterView:
    """What another thread may read: who holds what, and what is open where, at this moment."""
    replicas = {
        replica.replica_id: ReplicaView(
            replica.replica_id,
            replica.limits,
            replica.accepts,
            dict(replica.tiers),
            dict(replica.requests),
            dict(replica.num_requests_of),
            replica.context_tokens,
            replica.prefill_tokens,
            replica.tokens_left,
        )
        for replica in view.replicas.values()
    }
    holders = {name: set(held) for name, held in view.holders.items()}
    return ClusterView(view.costs, view.adapter_bytes, replicas, holders, view.now_s)
