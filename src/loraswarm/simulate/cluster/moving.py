"""Requests on their way between replicas: frozen, sent, received; what each hop takes.

A replica sends and receives one request's K and V at a time. Owns the links; the replicas own the
requests before and after. Called by cluster with the moves that a solver found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraswarm.cluster.migration.move_costs import MoveCosts
from loraswarm.cluster.migration.problem import Move
from loraswarm.core.cost_model import TransferCosts
from loraswarm.simulate.cluster.events import Events
from loraswarm.simulate.cluster.replica import Replica
from loraswarm.simulate.cluster.rows import SimRequest

MESSAGE_S = 0.001


@dataclass(slots=True)
class Moved:
    """What moves came to: requests, bytes that were sent, tokens that were to be computed again."""

    num_requests: int = 0
    num_bytes: int = 0
    num_lost_tokens: int = 0


@dataclass(slots=True)
class Mover:
    """`link` is what K and V take between two replicas, `costs` are told what was seen."""

    events: Events
    replicas: Mapping[str, Replica]
    link: TransferCosts
    costs: MoveCosts
    moved: Moved = field(default_factory=Moved)
    _free_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def begin(self, move: Move, request: SimRequest) -> bool:
        """Freeze it, unless it is not where it was when the move was decided."""
        if request.is_done or request.is_moving or request.replica_id != move.source:
            return False
        request.is_moving = True
        source = self.replicas[move.source]
        target = self.replicas[move.target]
        if request.adapter is not None:
            target.stock.prefetch(request.adapter)
        source.freeze(request, lambda: self._send(move, request))
        return True

    def _send(self, move: Move, request: SimRequest) -> None:
        """It has left the source. Without K and V its pages are free at once."""
        source, target = self.replicas[move.source], self.replicas[move.target]
        source.view.remove(request.request_id)
        num_bytes = 0
        if move.how == "kv" and request.num_computed:
            num_bytes = self._bytes_of(source, request.num_computed)
        else:
            self.moved.num_lost_tokens += request.num_computed
            request.num_computed = 0
        self.moved.num_requests += 1
        self.moved.num_bytes += num_bytes
        is_whole = request.num_computed == request.num_known - 1
        request.routed.prefill_tokens = request.num_known
        if num_bytes:
            request.routed.prefill_tokens = (
                0 if is_whole else request.num_known - request.num_computed
            )
        target.view.add(request.routed)
        num_pages, request.num_pages = request.num_pages, 0
        if not num_bytes:
            source.release_pages(num_pages)
            self.events.after(MESSAGE_S, lambda: self._land(target, request))
            return
        seconds = self._transfer_s(move, num_bytes)
        self.costs.saw_kv(num_bytes, seconds)

        def land() -> None:
            source.release_pages(num_pages)
            self._land(target, request)

        self.events.after(MESSAGE_S + seconds, land)

    def _land(self, target: Replica, request: SimRequest) -> None:
        request.is_moving = False
        target.receive(request)

    def _bytes_of(self, source: Replica, num_tokens: int) -> int:
        return source.view.pages_for(num_tokens) * source.limits.page_bytes

    def _transfer_s(self, move: Move, num_bytes: int) -> float:
        """Until it is there: both links must be free first."""
        now_s = self.events.now_s
        ends = (move.source, "out"), (move.target, "in")
        start_s = max(now_s, *(self._free_s.get(end, 0.0) for end in ends))
        end_s = start_s + self.link.seconds_for(num_bytes)
        for end in ends:
            self._free_s[end] = end_s
        return end_s - now_s
