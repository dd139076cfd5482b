"""Our policy: the replica on which a request adds least to the waiting of all.

Chooses among few candidates, so that a decision takes as long in a large cluster as in a small one.
Costs are of `costs`; where adapters and prefixes are is what replicas have reported.
"""

from __future__ import annotations

from random import Random

from loraswarm.cluster.routing.baselines import LeastLoaded
from loraswarm.cluster.routing.costs import MarginalCosts
from loraswarm.cluster.routing.router import NO_PREFIX, KnownPrefix
from loraswarm.cluster.view import ClusterView, RoutedRequest

MOST_COMPARED = 8
"""Up to so many replicas are all candidates; of more, NUM_CANDIDATES are."""
NUM_CANDIDATES = 6
MAX_HOLDERS = 4
MAX_PREFIXED = 2
MIN_DRAWN = 2
MAX_SORTED = 64
"""Holders of an adapter that are put in order to draw from; of more of them, draws from all
replicas find some soon enough."""
MAX_DRAWS = 256


class MarginalCost:
    """Least `AddedCost` wins; ties go to the candidate found first.

    Candidates: every replica if there are at most MOST_COMPARED. Else those that have most of the
    prompt cached (MAX_PREFIXED), those that have an adapter of the request (MAX_HOLDERS of each,
    drawn), and others drawn from all, to NUM_CANDIDATES but MIN_DRAWN in any case. Where nobody
    holds anything of it that is the power of several choices.

    Source    power of two choices: Mitzenmacher 2001; marginal cost of queue, step, load and prefix
              together: ours, in place of the scores of Punica, dLoRA and llm-d.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = Random(seed)
        self._costs: MarginalCosts | None = None
        self._last_resort = LeastLoaded()  # where no candidate accepts requests

    def route(
        self, request: RoutedRequest, view: ClusterView, prefix: KnownPrefix = NO_PREFIX
    ) -> str | None:
        """See `Router`; never None while a replica accepts requests."""
        costs = self._costs_of(view)
        best_id, best_s = None, 0.0
        for replica_id in self._candidates(request, view, prefix):
            replica = view.replicas[replica_id]
            if not replica.accepts:
                continue
            cost_s = costs.added(request, replica, view, prefix).total_s
            if best_id is None or cost_s < best_s:
                best_id, best_s = replica_id, cost_s
        if best_id is not None:
            return best_id
        return self._last_resort.route(request, view, prefix)

    def _costs_of(self, view: ClusterView) -> MarginalCosts:
        if self._costs is None or self._costs.steps.costs is not view.costs:
            self._costs = MarginalCosts(view.costs)
        return self._costs

    def _candidates(
        self, request: RoutedRequest, view: ClusterView, prefix: KnownPrefix
    ) -> list[str]:
        ids = list(view.replicas)
        if len(ids) <= MOST_COMPARED:
            return ids
        best = list(prefix.best_replicas())
        if len(best) > MAX_PREFIXED:
            best = [self._draw(best) for _ in range(MAX_PREFIXED)]
        chosen = [each for each in best if each in view.replicas]
        for name in request.adapters:
            chosen += self._draw_holders(view.holders.get(name, set()), ids)
        num_drawn = max(MIN_DRAWN, NUM_CANDIDATES - len(chosen))
        chosen += [self._draw(ids) for _ in range(num_drawn)]
        return list(dict.fromkeys(chosen))

    def _draw_holders(self, holders: set[str], ids: list[str]) -> list[str]:
        """At most MAX_HOLDERS of them; the same for the same seed, whatever a set's order is."""
        if len(holders) <= MAX_SORTED:
            ordered = sorted(holders)
            return self._random.sample(ordered, min(MAX_HOLDERS, len(ordered)))
        drawn: dict[str, None] = {}
        for _ in range(MAX_DRAWS):
            replica_id = self._draw(ids)
            if replica_id in holders:
                drawn[replica_id] = None
                if len(drawn) == MAX_HOLDERS:
                    break
        return list(drawn)

    def _draw(self, ids: list[str]) -> str:
        return ids[int(self._random.random() * len(ids))]
