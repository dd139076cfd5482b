"""dLoRA's numbers, and Algorithm 2, which moves the two thresholds of its Algorithm 1.

`DLORA_ARTIFACT` are those that its published code has, measured for a 7B model on another machine;
`measured_constants` are the same from this machine's figures. Used by dlora.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loraswarm.core.sequence import AdapterKey
from loraswarm.core.step_cost import ChunkWork, StepCosts, StepWork
from loraswarm.engine.policies.merging.effect import lora_s

STARVED_S = 10.0
"""With measured constants an adapter is starved when one of its requests was displaced so long."""
KEPT_SHARE = 0.5
TYPICAL_ADAPTERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DloraConstants:
    """Numbers of Algorithms 1 and 2.

    A step takes `merged_s` or `unmerged_s`, a switch `switch_s` more. A batch is `batch` requests.
    Each of N adapters begins with `credit_span * (N - 1)` credits, is starved from
    `credit_span * N` on, and then served until it has `credit_kept` fewer. A displaced request
    brings its adapter `starved_credit` or `batch_credit`. Thresholds move by `add` and `multiply`.
    """

    batch: int
    merged_s: float
    unmerged_s: float
    switch_s: float
    credit_span: float
    credit_kept: float
    starved_credit: float
    batch_credit: float
    first_alpha: float = 1.0
    multiply: float = 1.1
    add: float = 0.05

    @property
    def speed_ratio(self) -> float:
        """Seconds of a merged step over those of an unmerged one."""
        return self.merged_s / self.unmerged_s


DLORA_ARTIFACT = DloraConstants(
    batch=16,
    merged_s=0.015,
    unmerged_s=0.027,
    switch_s=0.02,
    credit_span=10_000.0,
    credit_kept=5_000.0,
    starved_credit=1 / 16,
    batch_credit=1 / (0.015 / 0.027 * 16),
)


def measured_constants(
    step: StepCosts, merge_s: float, batch: int, adapter_bytes: float
) -> DloraConstants:
    """For decode steps of `batch` rows with a few adapters of `adapter_bytes` in pages."""
    rows = [
        ChunkWork(
            num_tokens=1,
            num_computed=0,
            adapter=row % TYPICAL_ADAPTERS,
            adapter_bytes=round(adapter_bytes),
        )
        for row in range(batch)
    ]
    work = StepWork.of(rows, kv_token_bytes=0)
    unmerged_s = step.step_s(work)
    merged_s = unmerged_s - lora_s(step, work)
    batch_credit = unmerged_s / (merged_s * batch)
    credit_span = batch_credit / 2 * STARVED_S / merged_s  # a step may bring but half of it
    return DloraConstants(
        batch=batch,
        merged_s=merged_s,
        unmerged_s=unmerged_s,
        switch_s=merge_s,
        credit_span=credit_span,
        credit_kept=KEPT_SHARE * credit_span,
        starved_credit=1 / batch,
        batch_credit=batch_credit,
    )


@dataclass(slots=True)
class Thresholds:
    """Algorithm 2: `alpha` is the share of a batch from which an adapter is merged, `beta` that
    down to which it stays; they follow what either mode would have served since the last change of
    mode, by the constants' seconds."""

    constants: DloraConstants
    alpha: float = field(init=False)
    beta: float = field(init=False)
    num_steps: int = 0
    num_virtual_switches: int = 0
    num_merged: int = 0
    num_unmerged: int = 0
    last_largest: AdapterKey | None = None

    def __post_init__(self) -> None:
        self.alpha = self.constants.first_alpha
        self.beta = self.constants.speed_ratio

    def count(self, num_merged: int, num_unmerged: int) -> None:
        """A step could have had so many requests of one adapter, and so many of all."""
        self.num_merged += num_merged
        self.num_unmerged += num_unmerged

    def saw_largest(self, adapter: AdapterKey | None) -> None:
        """An unmerged step would have been this adapter's, had it been a merged one."""
        if adapter != self.last_largest:
            self.num_virtual_switches += 1
            self.last_largest = adapter

    def tune(self, is_merged: bool) -> None:
        """The mode changes: judge the one that was."""
        if self.num_steps == 0:
            return
        constants = self.constants
        merged_s = constants.merged_s * self.num_steps
        unmerged_s = constants.unmerged_s * self.num_steps
        if is_merged:
            merged_s += constants.switch_s
        else:
            unmerged_s += constants.switch_s
            merged_s += constants.switch_s * self.num_virtual_switches
        gain = self.num_merged / merged_s - self.num_unmerged / unmerged_s
        self._move_(is_merged, gain)
        self.num_merged = self.num_unmerged = self.num_virtual_switches = 0
        self.last_largest = None

    def _move_(self, is_merged: bool, gain: float) -> None:
        constants = self.constants
        if is_merged and gain > 0:
            if self.alpha - constants.add > self.beta:
                self.alpha -= constants.add
        elif is_merged and gain < 0:
            self.alpha *= constants.multiply
        elif gain < 0:
            if self.beta + constants.add < self.alpha:
                self.beta += constants.add
        elif gain > 0:
            self.beta /= constants.multiply
