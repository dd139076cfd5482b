"""Our policy: merge where what is surely saved over the steps ahead exceeds what switching costs.

What it decides by, for an adapter h of b bytes in pages, over the next T steps (the best T):

    value(h) = sum over intervals of share * gain - merge_s * (share at T - share now)
    gain     = lora * (  lora_product_s * b * (tokens of h - tokens of others)
                       + adapted_token_s * (tokens of h - tokens without an adapter)
                       + (lora_s + adapter_s + tile_byte_s * b) * steps of h alone
                       - (adapter_s + tile_byte_s * b) * steps of others alone )

which is `effect.merged_work` in the figures of core/step_cost: rows of h save their tiles, others
pay for h's with the sign reversed, so that the hot share must be high. `lora` is learned; a gain
counts with the factor that is sure, a loss with the likely one. `share` grows as fast as the
budget for switching allows. The gain's deviation comes from that of arrivals; a target is changed
only if the new one's value exceeds the old one's by as much, which is the hysteresis. Restoring is
free, so a target is given up when no T would pay.

Nobody is ever excluded from a step. So a request waits no longer than with nothing merged, but for
what the steps themselves take longer: the budget's share of each for switching, and, until a change
of the traffic is noticed, the merged adapter's own LoRA work on the others' rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.policies.merging.forecast import Forecast
from loraswarm.engine.policies.merging.learned import LearnedCosts
from loraswarm.engine.policies.merging.outlook import SPANS, Load, Outlook, chance_of_none
from loraswarm.engine.policies.merging.view import MergeCosts, MergeDecision, MergeView, StepSeen

MAX_RIVALS = 4
NO_LOAD = Load()
EVERY_STEPS = 4
"""Decisions until the next one is thought over though the same requests are open."""
DEVIATIONS = 2.0
"""How many deviations of its forecast a change of target must pay for."""


@dataclass(frozen=True, slots=True)
class Value:
    """Seconds saved by an adapter's being merged over the best time ahead, and their deviation."""

    seconds: float
    deviation: float

    @property
    def surely_s(self) -> float:
        return self.seconds - DEVIATIONS * self.deviation

    @property
    def perhaps_s(self) -> float:
        return self.seconds + DEVIATIONS * self.deviation


class CostPolicy:
    """One engine's forecast and learned costs."""

    def __init__(self, costs: MergeCosts) -> None:
        self._budget_share = costs.budget_share
        self.learned = LearnedCosts.of(costs)
        self.forecast = Forecast()
        self._last_seen: tuple[object, ...] = ()
        self._last: AdapterKey | None = None
        self._num_steps = 0  # since the last decision that was thought over

    def decide(self, view: MergeView) -> MergeDecision:
        target = view.target if view.target in view.mergeable else None
        requests = view.requests
        if not requests:
            return MergeDecision(target)
        self._num_steps += 1
        num_running = sum(request.is_running for request in requests)
        ends = requests[0].request_id, requests[-1].request_id
        found = (view.target, target, view.merged, len(requests), num_running, ends)
        if found == self._last_seen and self._num_steps < EVERY_STEPS:
            return MergeDecision(self._last if self._last in view.mergeable else None)
        usual_s = self.learned.mean_step_s or self.learned.step.fixed_s
        self.forecast.saw(requests, view.now_s, usual_s, self._num_steps)
        outlook = Outlook.of(view, self.forecast, self.learned.base_step_s)
        self._num_steps, self._last_seen = 0, found
        self._last = self._best(view, outlook, target)
        return MergeDecision(self._last)

    def saw_step(self, seen: StepSeen) -> None:
        self.learned.saw_step(seen)

    def _best(
        self, view: MergeView, outlook: Outlook, target: AdapterKey | None
    ) -> AdapterKey | None:
        least_s = 0.0
        if target is not None:
            kept = self._value(target, view, outlook)
            if kept.perhaps_s < 0.0:
                target = None
            else:
                least_s = max(0.0, kept.seconds)
        for rival in self._rivals(view, outlook, target):
            value_s = self._value(rival, view, outlook).surely_s
            if value_s > least_s:
                target, least_s = rival, value_s
        return target

    def _rivals(
        self, view: MergeView, outlook: Outlook, target: AdapterKey | None
    ) -> list[AdapterKey]:
        """The adapters that most of the work ahead is for."""
        work = {
            name: sum(load.tokens)
            for name, load in outlook.loads.items()
            if name is not None and name != target and name in view.mergeable
        }
        return sorted(work, key=lambda name: -work[name])[:MAX_RIVALS]

    def _value(self, adapter: AdapterKey, view: MergeView, outlook: Outlook) -> Value:
        """The best over times ahead, of at least one interval."""
        merge_s = max(self.learned.merge_s, 1e-9)
        share = first_share = view.share_of(adapter)
        num_bytes = view.mergeable[adapter]
        unit = self.learned.lora * self.learned.step.lora_product_s * num_bytes
        saved_s, variance, best = 0.0, 0.0, None
        for place, (begin, end) in enumerate(SPANS):
            growth = self._budget_share * (end - begin) * outlook.step_s[place] / merge_s
            last_share = min(1.0, share + growth)
            mean_share = _mean_share(share, last_share, growth)
            saved_s += mean_share * self._gain_s(adapter, num_bytes, outlook, place)
            variance += (mean_share * unit) ** 2 * outlook.total.variance[place]
            share = last_share
            value = Value(saved_s - merge_s * (share - first_share), math.sqrt(variance))
            if best is None or value.surely_s > best.surely_s:
                best = value
        assert best is not None
        return best

    def _gain_s(self, adapter: AdapterKey, num_bytes: int, outlook: Outlook, place: int) -> float:
        """Seconds that an interval's steps would take less with all of it merged."""
        step, learned = self.learned.step, self.learned
        load = outlook.loads.get(adapter, NO_LOAD)
        tokens = load.tokens[place]
        other_tokens, other_open, other_new = outlook.others(load, place)
        base = outlook.loads.get(None)
        base_tokens = base.tokens[place] if base else 0.0
        is_absent = chance_of_none(load.open_rows[place], load.new_rows[place])
        are_absent = chance_of_none(other_open, other_new)
        length = SPANS[place][1] - SPANS[place][0]
        fixed_s = step.adapter_s + step.tile_byte_s * num_bytes
        gain = (
            step.lora_product_s * num_bytes * (tokens - other_tokens)
            + step.adapted_token_s * (tokens - base_tokens)
            + (step.lora_s + fixed_s) * length * (1.0 - is_absent) * are_absent
            - fixed_s * length * is_absent * (1.0 - are_absent)
        )
        return gain * (learned.surely_lora if gain > 0.0 else learned.lora)


def _mean_share(first: float, last: float, growth: float) -> float:
    """Of a share that grows by `growth` until it is `last`, over the interval."""
    if growth <= 0.0:
        return first
    ramp = (last - first) / growth
    return ramp * (first + last) / 2.0 + (1.0 - ramp) * last
