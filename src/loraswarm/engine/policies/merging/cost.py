"""Our policy: merge where what is surely saved over the steps ahead exceeds what switching costs.

What it decides by: the steps ahead are cut into intervals (outlook), and for an adapter h of b
bytes in pages the gain of having it merged in one of them is

    gain = lora * (  lora_product_s * b * (tokens of h - tokens of others)
                   + adapted_token_s * (tokens of h - tokens without an adapter)
                   + (lora_s + adapter_s + tile_byte_s * b) * steps of h alone
                   - (adapter_s + tile_byte_s * b) * steps of others alone )

which is `effect.merged_work` in the figures of core/step_cost: rows of h save their tiles, others
pay for h's with the sign reversed, so that the hot share must be high. `lora` is learned; a gain
counts with the factor that is sure, a loss with the likely one. A plan says what is merged in each
interval; it saves the sum of share * gain, less merge_s for what must be merged, and `share` grows
as fast as the budget for switching allows. For each first thing to merge (what is the target now,
the adapters with most work ahead, nothing) the best plan is found. If that which saves most does
not begin with the target, the target is changed, provided that it saves more than never turning to
another adapter by DEVIATIONS of the difference, which varies as arrivals do: the hysteresis.

Nobody is ever excluded from a step. So a request waits no longer than with nothing merged, but for
what the steps themselves take longer: the budget's share of each for switching, and, until a change
of the traffic is noticed, the merged adapter's own LoRA work on the others' rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.policies.merging.forecast import Forecast
from loraswarm.engine.policies.merging.learned import LearnedCosts
from loraswarm.engine.policies.merging.outlook import SPANS, Load, Outlook, chance_of_none
from loraswarm.engine.policies.merging.plan import Plan, Prospect, best_plan
from loraswarm.engine.policies.merging.view import MergeCosts, MergeDecision, MergeView, StepSeen

MAX_RIVALS = 3
NO_LOAD = Load()
EVERY_STEPS = 8
"""Decisions until the next one is thought over though the same requests are open."""
DEVIATIONS = 1.0
"""How many deviations of its forecast a change of target must pay for."""


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
        names = self._rivals(view, outlook, target)
        if target is not None:
            names.append(target)
        prospect = Prospect(
            gains_s={name: self._gains_s(name, view, outlook) for name in names},
            growth=self._growth(outlook),
            merge_s=self.learned.merge_s,
        )
        kept = best_plan(target, view.share_of(target), prospect)
        others = [name for name in (None, *names) if name != target]
        plans = [best_plan(name, view.share_of(name), prospect) for name in others]
        best = max(plans, key=lambda plan: plan.seconds, default=kept)
        alone = replace(
            prospect, gains_s={n: g for n, g in prospect.gains_s.items() if n == target}
        )
        settled = best_plan(target, view.share_of(target), alone)
        margin_s = DEVIATIONS * self._deviation(best, settled, view, outlook)
        is_better = best.seconds > kept.seconds and best.seconds - settled.seconds > margin_s
        return best.states[0] if is_better else target

    def _growth(self, outlook: Outlook) -> list[float]:
        """Share that may be merged in each interval."""
        merge_s = max(self.learned.merge_s, 1e-9)
        return [
            self._budget_share * (end - begin) * step_s / merge_s
            for (begin, end), step_s in zip(SPANS, outlook.step_s, strict=True)
        ]

    def _deviation(self, one: Plan, other: Plan, view: MergeView, outlook: Outlook) -> float:
        """Of the difference of what two plans save."""
        variance = 0.0
        for place in range(len(SPANS)):
            first, second = (self._slope(plan, place, view) for plan in (one, other))
            is_same = one.states[place] == other.states[place]
            slope = first - second if is_same else first + second
            variance += slope**2 * outlook.total.variance[place]
        return math.sqrt(variance)

    def _slope(self, plan: Plan, place: int, view: MergeView) -> float:
        """Seconds that a token more or less makes in an interval of a plan."""
        state = plan.states[place]
        if state is None:
            return 0.0
        unit_s = self.learned.lora * self.learned.step.lora_product_s * view.mergeable[state]
        return plan.mean_shares[place] * unit_s

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

    def _gains_s(self, adapter: AdapterKey, view: MergeView, outlook: Outlook) -> list[float]:
        num_bytes = view.mergeable[adapter]
        return [self._gain_s(adapter, num_bytes, outlook, place) for place in range(len(SPANS))]

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
