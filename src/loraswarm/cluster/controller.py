"""What a cluster does by itself, now and then: how many replicas, which adapters where, which
requests move.

Carries out what pure functions decide from the view. Nothing depends on it: while it fails, or is
slow, requests are routed by what replicas hold, as before. Started and closed by the command
`serve`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from loraswarm.cluster.front import ClusterClient
from loraswarm.cluster.moving import MoveFailed
from loraswarm.cluster.scaling import Action, Drain, Reopen, Start
from loraswarm.cluster.view import ClusterView
from loraswarm.core.admin import PrefetchAdapter
from loraswarm.errors import LoRASwarmError

T = TypeVar("T")
log = logging.getLogger(__name__)


class PlannedMove(Protocol):
    """One request that is better off elsewhere."""

    @property
    def request_id(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def how(self) -> Literal["kv", "prefill"]: ...


class PlannedPrefetch(Protocol):
    """One adapter that a replica should have."""

    @property
    def replica_id(self) -> str: ...

    @property
    def adapter(self) -> str: ...


Solve = Callable[[], T]
"""Runs on a thread of its own; must not look at the view, which changes meanwhile."""
PlanMoves = Callable[[ClusterView], Solve[Sequence[PlannedMove]] | None]
PlanPrefetches = Callable[[ClusterView], Solve[Sequence[PlannedPrefetch]] | None]


class Scaler(Protocol):
    """Decides how many replicas there should be; see cluster/scaling."""

    def decide(
        self, view: ClusterView, draining: Collection[str] = (), num_starting: int = 0
    ) -> Action | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Duties:
    """What to do every so many seconds; None: not at all."""

    moves: PlanMoves | None = None
    moves_every_s: float = 1.0
    prefetches: PlanPrefetches | None = None
    prefetches_every_s: float = 5.0
    scaling: Scaler | None = None
    scaling_every_s: float = 2.0


class Controller:
    """The duties of one cluster, each in a loop of its own that outlives its failures."""

    def __init__(self, client: ClusterClient, duties: Duties) -> None:
        self._client = client
        self._duties = duties
        self._tasks: list[asyncio.Task[None]] = []
        self._removals: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin, in the running event loop."""
        duties = self._duties
        loops: list[tuple[str, float, Callable[[], Awaitable[None]]]] = []
        if (plan_moves := duties.moves) is not None:
            loops.append(("moves", duties.moves_every_s, lambda: self.move(plan_moves)))
        if (plan := duties.prefetches) is not None:
            loops.append(("prefetches", duties.prefetches_every_s, lambda: self.prefetch(plan)))
        if (scaler := duties.scaling) is not None:
            loops.append(("scaling", duties.scaling_every_s, lambda: self.scale(scaler)))
        self._tasks = [asyncio.create_task(_repeat(*loop)) for loop in loops]

    async def close(self) -> None:
        """Stop; what was begun of a move is brought to its end."""
        tasks = [*self._tasks, *self._removals]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def move(self, plan: PlanMoves) -> None:
        """Solve once, if load is unbalanced, and move what that says."""
        solve = plan(self._client.view)
        if solve is None:
            return
        moves = await asyncio.to_thread(solve)
        done = await asyncio.gather(*(self._try_move(move) for move in moves))
        if moves:
            log.info("moved num_requests=%d of=%d", sum(done), len(moves))

    async def prefetch(self, plan: PlanPrefetches) -> None:
        """Plan once, and let replicas bring what they lack; they go on serving."""
        solve = plan(self._client.view)
        if solve is None:
            return
        wanted = await asyncio.to_thread(solve)
        await asyncio.gather(*(self._try_prefetch(one) for one in wanted))

    async def scale(self, scaler: Scaler) -> None:
        """Ask once, and begin what that says: starts and removals take their time."""
        fleet, view = self._client.fleet, self._client.view
        view.now_s = asyncio.get_running_loop().time()
        action = scaler.decide(view, fleet.leaving, fleet.num_starting)
        if action is not None:
            log.info("scaling num_replicas=%d %s", len(view.replicas), action)
        if isinstance(action, Start):
            fleet.add(action.num_replicas)
        elif isinstance(action, Reopen):
            fleet.reopen(action.replica_id)
        elif isinstance(action, Drain):
            removal = asyncio.create_task(fleet.remove(action.replica_id))
            self._removals.add(removal)
            removal.add_done_callback(self._note_removal)

    def _note_removal(self, removal: asyncio.Task[None]) -> None:
        self._removals.discard(removal)
        if not removal.cancelled() and (error := removal.exception()):
            log.warning("removal failed: %s", error)

    async def _try_move(self, move: PlannedMove) -> bool:
        try:
            await self._client.mover.move(move.request_id, move.target, move.how == "kv")
        except MoveFailed as error:
            log.info("%s", error)
            return False
        return True

    async def _try_prefetch(self, wanted: PlannedPrefetch) -> None:
        replica = self._client.fleet.replicas.get(wanted.replica_id)
        if replica is None:
            return
        try:
            await replica.administer(PrefetchAdapter(wanted.adapter))
        except LoRASwarmError as error:
            log.info("replica=%s prefetch of %r: %s", replica.replica_id, wanted.adapter, error)


async def _repeat(name: str, every_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Again and again, whatever becomes of it: a bug in a decision must not end serving."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
        except Exception:
            log.exception("controller duty=%s failed; it is tried again in %g s", name, every_s)
