"""dLoRA's Algorithm 1: merge the adapter that fills a batch, run others by credits and by age.

A step is of one merged adapter, or of the oldest requests unmerged; whoever is displaced gains
credit, and runs once it is starved. Knows no costs but its constants. Source: Wu et al., OSDI 2024,
as its published code has it; where that code would fail (no adapter has credit) it runs by age.
"""

from __future__ import annotations

from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.policies.merging.dlora_thresholds import (
    DloraConstants,
    Thresholds,
    measured_constants,
)
from loraswarm.engine.policies.merging.learned import PLAUSIBLE_STEP, UNKNOWN_MERGE_S
from loraswarm.engine.policies.merging.view import (
    MergeCosts,
    MergeDecision,
    MergeView,
    OpenRequest,
    StepSeen,
    rows_by_adapter,
)

Name = AdapterKey | None
Groups = dict[Name, list[OpenRequest]]


class Dlora:
    """One engine's credits and thresholds; constants are measured ones unless they are given.

    Adapters are counted as they appear. With measured constants, credits are such that an adapter
    one of whose requests is displaced in every step is starved after `STARVED_S` seconds, and then
    runs next; those of the artifact take more than a minute.
    """

    def __init__(self, costs: MergeCosts, constants: DloraConstants | None = None) -> None:
        self._costs = costs
        self._thresholds = None if constants is None else Thresholds(constants)
        self._earned: dict[Name, float] = {}
        self._starved: set[Name] = set()
        self._merged: AdapterKey | None = None

    @property
    def thresholds(self) -> Thresholds:
        """Of Algorithm 2; there from the first decision on."""
        assert self._thresholds is not None
        return self._thresholds

    def credit(self, adapter: Name) -> float:
        """Credits of an adapter, in the units of the constants."""
        span = self.thresholds.constants.credit_span
        return span * (len(self._earned) - 1) + self._earned[adapter]

    def decide(self, view: MergeView) -> MergeDecision:
        if not view.requests:
            return MergeDecision(view.target if view.target in view.mergeable else None)
        if self._thresholds is None:
            self._thresholds = Thresholds(self._measured(view))
        if self._merged not in view.mergeable:
            self._merged = None
        groups = rows_by_adapter(view.requests)
        for adapter in groups:
            self._earned.setdefault(adapter, 0.0)
        run = self._choose(view, groups)
        chosen = frozenset(request.request_id for request in run)
        only = None if len(chosen) == len(view.requests) else chosen
        return MergeDecision(self._merged, only)

    def saw_step(self, seen: StepSeen) -> None:
        pass

    def _measured(self, view: MergeView) -> DloraConstants:
        merge_s = self._costs.merge_s
        sizes = list(view.mergeable.values()) or [0]
        return measured_constants(
            self._costs.step or PLAUSIBLE_STEP,
            UNKNOWN_MERGE_S if merge_s is None else merge_s,
            view.num_seats,
            sum(sizes) / len(sizes),
        )

    def _choose(self, view: MergeView, groups: Groups) -> list[OpenRequest]:
        """Who runs: Algorithm 1; sets what is merged."""
        constants = self.thresholds.constants
        first = list(view.requests[: constants.batch])
        starved = self._take_starved(groups)
        if not starved:
            return self._choose_mode(view, groups, first)
        taken = {request.request_id for request in starved}
        room = constants.batch - len(starved)
        rest = [request for request in view.requests if request.request_id not in taken]
        run = starved + rest[: max(0, room)]
        self._transfer(first, run, constants.starved_credit)
        self._leave_merged()
        return run

    def _take_starved(self, groups: Groups) -> list[OpenRequest]:
        """Requests of the adapters that have waited too long, at most a batch."""
        constants = self.thresholds.constants
        room, found, starved = constants.batch, list[OpenRequest](), set[Name]()
        for adapter in sorted(groups, key=lambda name: -self._earned[name]):
            earned = self._earned[adapter]
            least = constants.credit_span
            if adapter in self._starved:
                least -= constants.credit_kept
            if earned >= least and room > 0:
                found += groups[adapter][:room]
                room = constants.batch - len(found)
                starved.add(adapter)
        self._starved = starved
        return found

    def _choose_mode(
        self, view: MergeView, groups: Groups, first: list[OpenRequest]
    ) -> list[OpenRequest]:
        """Nobody is starved: stay merged, merge the largest, or run by age."""
        thresholds, batch = self.thresholds, self.thresholds.constants.batch
        least = -thresholds.constants.credit_span * (len(self._earned) - 1)
        able = [name for name in groups if name in view.mergeable and self._earned[name] >= least]
        largest = max(able, key=lambda name: len(groups[name]), default=None)
        num_largest = len(groups[largest]) if largest is not None else 0
        active = self._merged if len(self._earned) > 1 else largest
        if active in able and len(groups[active]) >= thresholds.beta * len(first):
            run = groups[active]
            self._merged = active
            thresholds.num_steps += 1
            self._transfer(first, run, thresholds.constants.batch_credit)
        elif largest is not None and num_largest >= thresholds.alpha * len(first):
            thresholds.tune(self._merged is not None)
            self._merged, thresholds.num_steps = largest, 1
            run = groups[largest][:batch]
            self._transfer(first, run, thresholds.constants.batch_credit)
        else:
            thresholds.saw_largest(largest)
            run = first
        thresholds.count(min(num_largest, batch), len(first))
        if run is first:
            self._leave_merged()
        return run

    def _leave_merged(self) -> None:
        """The step is an unmerged one."""
        if self._merged is None:
            self.thresholds.num_steps += 1
            return
        self.thresholds.tune(is_merged=True)
        self._merged, self.thresholds.num_steps = None, 1

    def _transfer(self, first: list[OpenRequest], run: list[OpenRequest], credit: float) -> None:
        """Credits go from those that run out of turn to those that would have run by age."""
        in_turn = {request.request_id for request in first}
        running = {request.request_id for request in run}
        ordered = sorted(run, key=lambda request: request.request_id not in in_turn)
        if len(first) == len(run):
            for taker, giver in zip(ordered, first, strict=True):
                if taker.request_id not in in_turn:
                    self._earned[taker.adapter] -= credit
                    self._earned[giver.adapter] += credit
            return
        for waiting in first:
            if waiting.request_id not in running:
                self._earned[ordered[0].adapter] -= credit / 2
                self._earned[waiting.adapter] += credit / 2
