"""What steps, adapters and switches cost here, learned from the steps that were taken.

Two factors correct figures of core/step_cost: one of all that the base does, one of all that
adapters add. A Kalman filter follows both, so that each is known with a confidence. Knows neither
requests nor what is decided. Used by cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from loraswarm.core.step_cost import StepCosts, StepWork
from loraswarm.engine.policies.merging.effect import lora_s, merged_work, shared_lora_s
from loraswarm.engine.policies.merging.view import MergeCosts, StepSeen

PLAUSIBLE_STEP = StepCosts(
    fixed_s=2e-2,
    brackets=(0,),
    token_s=(4e-4,),
    logit_row_s=2e-4,
    lora_s=5e-4,
    adapter_s=1e-4,
    adapted_token_s=3e-5,
    tile_byte_s=3e-11,
    lora_product_s=1e-12,
    kv_byte_s=2e-11,
    attention_pair_s=1e-7,
)
"""Where nothing was measured: the shape of a small model's costs; factors find the scale."""
UNKNOWN_MERGE_S = 0.2
MEASURED_DEVIATION = 0.3
PLAUSIBLE_DEVIATION = 3.0
NOISE = 0.1
"""Deviation of a step's seconds from what it would take, as a share of them."""
DRIFT = 0.003
"""How far a factor may move from one step to the next, as a share of what it is."""
OUTLIER = 3.0
KEPT_SHARE = 0.9
MIN_SHARE = 1e-3


@dataclass(slots=True)
class LearnedCosts:
    """Figures of one engine.

    `base` and `lora` multiply the two parts of what `step` says; the covariance of the two is kept
    in three numbers. A step that took far longer than all before (something else ran) moves them
    no further than one at the edge of what is believed.
    """

    step: StepCosts
    merge_s: float
    first_deviation: float
    base: float = 1.0
    lora: float = 1.0
    mean_step_s: float = 0.0
    _base_variance: float = field(init=False)
    _lora_variance: float = field(init=False)
    _covariance: float = 0.0

    def __post_init__(self) -> None:
        self._base_variance = self._lora_variance = self.first_deviation**2

    @classmethod
    def of(cls, costs: MergeCosts) -> LearnedCosts:
        """Before anything is seen."""
        merge_s = UNKNOWN_MERGE_S if costs.merge_s is None else costs.merge_s
        if costs.step is None:
            return cls(PLAUSIBLE_STEP, merge_s, PLAUSIBLE_DEVIATION)
        return cls(costs.step, merge_s, MEASURED_DEVIATION)

    @property
    def lora_deviation(self) -> float:
        """Of `lora`: how well it is known."""
        return math.sqrt(self._lora_variance)

    @property
    def surely_lora(self) -> float:
        """A factor that `lora` is not below, as far as is known; 0 if nothing is."""
        return max(0.0, self.lora - self.lora_deviation)

    def base_step_s(self, num_tokens: float) -> float:
        """Seconds of a step of so many tokens, without adapters and whatever they attend to."""
        work = StepWork(num_tokens=round(num_tokens), num_logit_rows=0)
        return self.base * self.step.step_s(work)

    def saw_step(self, seen: StepSeen) -> None:
        """Learn from a step, and from the switching beside it."""
        if seen.switched_share > MIN_SHARE:
            found_s = seen.switch_s / seen.switched_share
            self.merge_s = KEPT_SHARE * self.merge_s + (1.0 - KEPT_SHARE) * found_s
        if seen.seconds <= 0.0:
            return
        kept = KEPT_SHARE if self.mean_step_s else 0.0
        self.mean_step_s = kept * self.mean_step_s + (1.0 - kept) * seen.seconds
        base_s = self.step.step_s(seen.work) - lora_s(self.step, seen.work)
        if base_s > 0.0:
            self._correct(seen.seconds / base_s, self._expected_lora_s(seen) / base_s)

    def _expected_lora_s(self, seen: StepSeen) -> float:
        merged: StepWork = merged_work(seen.work, seen.num_hot_tokens, seen.merged_bytes)
        return shared_lora_s(self.step, seen.work, merged, seen.merged_share)

    def _correct(self, found: float, ratio: float) -> None:
        """One observation: `found` = base + ratio * lora, all in units of the base's seconds."""
        limit = self.first_deviation**2
        base_variance = min(limit, self._base_variance + (DRIFT * self.base) ** 2)
        lora_variance = min(limit, self._lora_variance + (DRIFT * self.lora) ** 2)
        covariance = self._covariance
        expected = self.base + ratio * self.lora
        with_base = base_variance + ratio * covariance
        with_lora = covariance + ratio * lora_variance
        noise = (NOISE * max(found, min(expected, 2.0 * found))) ** 2
        variance = with_base + ratio * with_lora + noise
        bound = OUTLIER * math.sqrt(variance)
        surprise = max(-bound, min(bound, found - expected))
        self.base = max(1e-6, self.base + with_base / variance * surprise)
        self.lora = max(0.0, self.lora + with_lora / variance * surprise)
        self._base_variance = base_variance - with_base**2 / variance
        self._lora_variance = lora_variance - with_lora**2 / variance
        self._covariance = covariance - with_base * with_lora / variance
