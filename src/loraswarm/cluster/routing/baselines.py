"""Policies to compare with: round-robin, least-loaded, Punica's packing, dLoRA's dispatch.

Each does what its source says, on the same view as ours; none looks at cached prefixes.
"""

from __future__ import annotations

from loraswarm.cluster.routing.costs import mean_adapter_bytes
from loraswarm.cluster.routing.router import NO_PREFIX, KnownPrefix, accepting
from loraswarm.cluster.view import ClusterView, ReplicaView, RoutedRequest


class RoundRobin:
    """Every replica in turn, in the view's order."""

    def __init__(self) -> None:
        self._num_routed = 0

    def route(
        self, request: RoutedRequest, view: ClusterView, prefix: KnownPrefix = NO_PREFIX
    ) -> str | None:
        """See `Router`."""
        replicas = accepting(view)
        if not replicas:
            return None
        self._num_routed += 1
        return replicas[(self._num_routed - 1) % len(replicas)].replica_id


class LeastLoaded:
    """The fewest open requests; ties to the first in the view's order. Looks at every replica."""

    def route(
        self, request: RoutedRequest, view: ClusterView, prefix: KnownPrefix = NO_PREFIX
    ) -> str | None:
        """See `Router`."""
        least = min(accepting(view), key=lambda each: len(each.requests), default=None)
        return None if least is None else least.replica_id


class PunicaPacking:
    """The fullest replica that has a seat and pages for the prompt, so that others run empty.

    Ties go to the largest id. If none has room the request is held in one queue for all.
    Source    Punica (arXiv 2310.18547), section 5.1.
    """

    def route(
        self, request: RoutedRequest, view: ClusterView, prefix: KnownPrefix = NO_PREFIX
    ) -> str | None:
        """See `Router`."""
        order = sorted(
            accepting(view), key=lambda each: (len(each.requests), each.replica_id), reverse=True
        )
        for replica in order:
            if has_room(request, replica, view):
                return replica.replica_id
        return None


def has_room(request: RoutedRequest, replica: ReplicaView, view: ClusterView) -> bool:
    """Whether it can start there at once: a free seat, and pages for its tokens and its adapters.

    A sequence leaves at most a part of one page empty. Idle adapters take no room: they can leave.
    """
    limits = replica.limits
    if len(replica.requests) >= limits.num_seats:
        return False
    taken = replica.pages_for(replica.context_tokens) + len(replica.requests)
    in_use = replica.num_requests_of
    num_bytes = len(in_use) * mean_adapter_bytes(replica, view)
    new = (name for name in request.adapters if name not in in_use)
    num_bytes += sum(view.adapter_bytes.get(name, 0) for name in new)
    taken += -int(-num_bytes // limits.page_bytes)
    return taken + replica.pages_for(request.context_tokens + 1) <= limits.num_pages


class DloraDispatch:
    """The least of dLoRA's engine costs among replicas that hold the adapter, and among those where
    it could take the place of an idle adapter that others hold too, for the time of a transfer.

        cost = sum over adapters k of floor(count_k / 16) * 0.6
               + floor((sum over k of count_k mod 16) / 16)

    The batch is 16; a merged step takes 0.6 of another. dLoRA places every adapter somewhere before
    it serves; one that nobody holds may go to any replica here. The base counts as an adapter that
    all hold. Ties go to the first in the view's order. Looks at every replica.
    Source    engine_manager.py of dLoRA's artifact (OSDI 2024), migration type 2.
    """

    batch_size = 16
    merged_share = 0.6
    transfer_bytes_per_s = float(32 << 30)

    def route(
        self, request: RoutedRequest, view: ClusterView, prefix: KnownPrefix = NO_PREFIX
    ) -> str | None:
        """See `Router`."""
        best_id, best = None, 0.0
        num_bytes = sum(view.adapter_bytes.get(name, 0) for name in request.adapters)
        transfer_s = num_bytes / self.transfer_bytes_per_s
        is_nowhere = not any(name in view.holders for name in request.adapters)
        for replica in accepting(view):
            cost = self.engine_cost(replica)
            if not all(name in replica.tiers for name in request.adapters):
                if not is_nowhere and not self._has_spare(replica, view):
                    continue
                cost += transfer_s
            if best_id is None or cost < best:
                best_id, best = replica.replica_id, cost
        if best_id is None:
            return LeastLoaded().route(request, view)  # its holders drain, and nobody has a place
        return best_id

    def engine_cost(self, replica: ReplicaView) -> float:
        """Batches that are waiting there, as dLoRA counts them."""
        counts = list(replica.num_requests_of.values())
        counts.append(max(0, len(replica.requests) - sum(counts)))
        merged = sum(count // self.batch_size for count in counts)
        rest = sum(count % self.batch_size for count in counts)
        return merged * self.merged_share + rest // self.batch_size

    def _has_spare(self, replica: ReplicaView, view: ClusterView) -> bool:
        """Whether an adapter is idle there that is held elsewhere too."""
        return any(
            name not in replica.num_requests_of and len(view.holders[name]) > 1
            for name in replica.tiers
        )
