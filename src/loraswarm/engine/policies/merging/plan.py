"""The best order of things to merge over the intervals of an outlook, for a given first one.

Forward dynamic programming; states are adapters, or None for all restored. Knows gains and costs as
numbers only. Called by cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraswarm.core.sequence import AdapterKey

State = AdapterKey | None


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is needed to plan by, for each interval ahead.

    `gains_s` are the seconds that each adapter saves if all of it is merged; `growth` is how much
    share the budget for switching allows to merge. Merging everything takes `merge_s`.
    """

    gains_s: Mapping[AdapterKey, Sequence[float]]
    growth: Sequence[float]
    merge_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What is merged in each interval, its mean share there, and the seconds that all this saves.
    `share` is that at the end."""

    seconds: float = 0.0
    share: float = 0.0
    states: tuple[State, ...] = ()
    mean_shares: tuple[float, ...] = ()

    def worth_s(self, prospect: Prospect) -> float:
        """What it saves, and what is merged at its end, which need not be paid again."""
        return self.seconds + prospect.merge_s * self.share

    def extended(self, state: State, share: float, prospect: Prospect) -> Plan:
        """By one interval in a state that begins with that share of it merged."""
        place = len(self.states)
        if state is None:
            return Plan(self.seconds, 0.0, (*self.states, None), (*self.mean_shares, 0.0))
        growth = prospect.growth[place]
        last_share = min(1.0, share + growth)
        mean_share = _mean_share(share, last_share, growth)
        saved_s = mean_share * prospect.gains_s[state][place]
        paid_s = prospect.merge_s * (last_share - share)
        return Plan(
            self.seconds + saved_s - paid_s,
            last_share,
            (*self.states, state),
            (*self.mean_shares, mean_share),
        )


def best_plan(first: State, first_share: float, prospect: Prospect) -> Plan:
    """The best that begins with `first`, of which so much is merged already."""
    plans: dict[State, Plan] = {first: Plan().extended(first, first_share, prospect)}
    states: tuple[State, ...] = (None, *prospect.gains_s)
    for _ in prospect.growth[1:]:
        left = sorted(plans, key=lambda state: -plans[state].seconds)[:2]
        following: dict[State, Plan] = {}
        for state in states:
            origin = next((other for other in left if other != state), None)
            found = []
            if state in plans:
                found.append(plans[state].extended(state, plans[state].share, prospect))
            if origin in plans and origin != state:
                found.append(plans[origin].extended(state, 0.0, prospect))
            if found:
                following[state] = max(found, key=lambda plan: plan.worth_s(prospect))
        plans = following
    return max(plans.values(), key=lambda plan: plan.seconds)


def _mean_share(first: float, last: float, growth: float) -> float:
    """Of a share that grows by `growth` until it is `last`, over the interval."""
    if growth <= 0.0:
        return first
    ramp = (last - first) / growth
    return ramp * (first + last) / 2.0 + (1.0 - ramp) * last
