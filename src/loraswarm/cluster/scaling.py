"""When to start, drain or reopen a replica: by predicted queue time upwards, by packing downwards.

Decides only; the front starts processes, drains and moves. Reads the view, with its clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from loraswarm.cluster.routing.costs import MarginalCosts
from loraswarm.cluster.routing.router import accepting
from loraswarm.cluster.view import ClusterView, ReplicaView, RoutedRequest
from loraswarm.errors import ConfigError

TYPICAL_PROMPT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRules:
    """Between `min_replicas` and `max_replicas`. More are wanted when a new request would wait for
    longer than `target_wait_s`, one fewer when all that is open would fill the others to at most
    `fill_share` of their seats and pages, for `patience_s` without a break. After an action nothing
    is started for `up_pause_s` and nothing drained for `down_pause_s`.

    Raises    ConfigError naming the option.
    """

    min_replicas: int
    max_replicas: int
    target_wait_s: float = 2.0
    fill_share: float = 0.7
    patience_s: float = 30.0
    up_pause_s: float = 15.0
    down_pause_s: float = 60.0

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ConfigError(f"--min-replicas is {self.min_replicas}; it must be at least 1")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"--max-replicas is {self.max_replicas}; it must be at least --min-replicas "
                f"({self.min_replicas})"
            )


@dataclass(frozen=True, slots=True)
class Start:
    """So many replicas more."""

    num_replicas: int


@dataclass(frozen=True, slots=True)
class Drain:
    """It accepts nothing more, and is removed when nothing is open on it."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Reopen:
    """One that drains accepts requests again: that is faster than a start."""

    replica_id: str


Action = Start | Drain | Reopen


class Autoscaler:
    """Asked every few seconds; answers one action or none.

    Source    Punica (arXiv 2310.18547), section 5.1: what is open is packed on few replicas, so
              that lightly loaded ones run empty; more are asked for when none is lightly loaded.
              There by seats in use, here by the time that a request would wait.
    """

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._fits_since_s: float | None = None
        self._acted_s = -math.inf

    def decide(
        self, view: ClusterView, draining: Collection[str] = (), num_starting: int = 0
    ) -> Action | None:
        """What to do now. `draining` replicas do not accept and are to be removed; `num_starting`
        are not in the view yet."""
        serving = accepting(view)
        num_coming = len(serving) + num_starting
        is_short = self._is_short(view, serving)
        self._watch_fit(view, serving, is_short)
        if num_coming < self._rules.min_replicas:
            return self._grow(view, draining, self._rules.min_replicas - num_coming)
        pause_s = view.now_s - self._acted_s
        if is_short:
            num_more = self._num_more(view, serving, num_coming)
            if num_more > 0 and pause_s >= self._rules.up_pause_s:
                return self._grow(view, draining, num_more)
            return None
        if num_starting or draining or len(serving) <= self._rules.min_replicas:
            return None
        fits_s = 0.0 if self._fits_since_s is None else view.now_s - self._fits_since_s
        if self._fits_since_s is None or fits_s < self._rules.patience_s:
            return None
        if pause_s < self._rules.down_pause_s:
            return None
        self._acted_s = view.now_s
        return Drain(lightest(serving, view).replica_id)

    def _grow(self, view: ClusterView, draining: Collection[str], num_more: int) -> Action:
        """Reopen the fullest that drains, one at a time, before any is started."""
        self._acted_s = view.now_s
        known = [view.replicas[each] for each in draining if each in view.replicas]
        if known:
            return Reopen(
                max(known, key=lambda each: (each.num_requests, each.replica_id)).replica_id
            )
        return Start(num_more)

    def _is_short(self, view: ClusterView, serving: list[ReplicaView]) -> bool:
        return bool(serving) and queue_s(view, serving) > self._rules.target_wait_s

    def _num_more(self, view: ClusterView, serving: list[ReplicaView], num_coming: int) -> int:
        """In proportion to how far the wait is off, at most as many again; 0 at the maximum."""
        excess = min(queue_s(view, serving) / self._rules.target_wait_s, 2.0)
        wanted = min(math.ceil(len(serving) * excess), self._rules.max_replicas)
        return wanted - num_coming

    def _watch_fit(self, view: ClusterView, serving: list[ReplicaView], is_short: bool) -> None:
        """Note since when one replica fewer would do."""
        if is_short or not fits_without_one(serving, view, self._rules.fill_share):
            self._fits_since_s = None
        elif self._fits_since_s is None:
            self._fits_since_s = view.now_s


def queue_s(view: ClusterView, serving: list[ReplicaView]) -> float:
    """Seconds that a request of the base would wait for its turn, over all these replicas."""
    costs = MarginalCosts(view.costs)
    typical = RoutedRequest(
        request_id="",
        adapters=(),
        prompt_tokens=TYPICAL_PROMPT,
        expected_tokens=1,
        prefill_tokens=TYPICAL_PROMPT,
    )
    waits = [costs.added(typical, replica, view).wait_s for replica in serving]
    return sum(waits) / len(waits)


def fits_without_one(serving: list[ReplicaView], view: ClusterView, fill_share: float) -> bool:
    """Whether what is open on all would fill all but the lightest to no more than that share."""
    if len(serving) < 2:
        return False
    lightest_one = lightest(serving, view)
    others = [replica for replica in serving if replica is not lightest_one]
    num_open = sum(replica.num_requests for replica in serving)
    num_tokens = sum(replica.context_tokens for replica in serving)
    num_seats = sum(each.limits.num_seats for each in others)
    room_tokens = sum(each.limits.num_pages * each.limits.page_tokens for each in others)
    return num_open <= fill_share * num_seats and num_tokens <= fill_share * room_tokens


def lightest(serving: list[ReplicaView], view: ClusterView) -> ReplicaView:
    """Whom to drain: the fewest open requests, then the fewest adapters that nobody else holds,
    then the smallest id, as packing prefers the largest."""
    return min(
        serving, key=lambda each: (each.num_requests, _num_sole(each, view), each.replica_id)
    )


def _num_sole(replica: ReplicaView, view: ClusterView) -> int:
    return sum(len(view.holders.get(name, ())) == 1 for name in replica.tiers)
