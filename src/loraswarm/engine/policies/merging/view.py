"""What a merge policy is shown, what it answers, and what it is told about steps that were taken.

Plain data: no torch, no clock, no pages. Built by the engine or the simulator before and after a
step; a policy decides from it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from loraswarm.core.sequence import AdapterKey, Sequence
from loraswarm.core.step_cost import StepCosts, StepWork


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request that has not ended.

    `adapter` is the one that its rows have alone and with weight 1; None for the base and for what
    can be no hot row: mixes, other weights, LoRAs that act from a later token on.
    `prefill_tokens` are known tokens to compute before the next is drawn, but for the last one;
    `output_tokens` are those it may generate still, at most. `waited_s` is its age.
    """

    request_id: str
    adapter: AdapterKey | None
    is_running: bool
    prefill_tokens: int
    output_tokens: int
    waited_s: float

    @property
    def tokens_left(self) -> int:
        """Rows that it takes in steps until its end, at most."""
        return self.prefill_tokens + self.output_tokens

    @classmethod
    def of(cls, sequence: Sequence, is_running: bool, now_s: float) -> Self:
        """As the scheduler knows it; `now_s` is of the clock that `arrived_s` is of."""
        mix = sequence.mix
        is_plain = len(mix) == 1 and mix[0][1] == 1.0 and sequence.first_adapted == 0
        return cls(
            request_id=sequence.request_id,
            adapter=mix[0][0] if is_plain else None,
            is_running=is_running,
            prefill_tokens=max(0, sequence.num_uncomputed - 1),
            output_tokens=max(0, sequence.max_tokens - sequence.num_output),
            waited_s=now_s - sequence.arrived_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeView:
    """The engine between two steps.

    `requests` are in order of arrival. `mergeable` has the bytes in pages of what would be merged,
    A and B at all linears, of each adapter that may be now, at least of those of the requests and
    of `target` and `merged`; one that was unloaded or has no such update is not in it. Gains (DoRA)
    are never merged, so an adapter that has them may be, beside any other row. The switcher works
    towards `target`; `merged_share` of the bytes that can be merged have `merged` in them. A step
    has at most `num_seats` rows of different requests and `max_step_tokens` tokens.
    """

    now_s: float
    requests: tuple[OpenRequest, ...]
    mergeable: Mapping[AdapterKey, int]
    num_seats: int
    max_step_tokens: int
    target: AdapterKey | None = None
    merged: AdapterKey | None = None
    merged_share: float = 0.0

    def share_of(self, adapter: AdapterKey | None) -> float:
        """Share of the mergeable bytes that have this adapter in them."""
        return self.merged_share if adapter is not None and adapter == self.merged else 0.0


@dataclass(frozen=True, slots=True)
class MergeDecision:
    """`target` is to be merged (None: all is to be restored), layer by layer beside the steps.

    `only`: no other requests compute in the next step (None: all may).
    """

    target: AdapterKey | None
    only: frozenset[str] | None = None


NOTHING_MERGED = MergeDecision(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeen:
    """What a step did and took.

    `work` is what it would have been with nothing merged. During it `merged_share` was merged with
    an adapter of `merged_bytes` in pages, which `num_hot_tokens` of its tokens have. `seconds` are
    the step's own; switching beside it took `switch_s` and changed the share by `switched_share`
    (below 0: restored).
    """

    work: StepWork
    seconds: float
    num_hot_tokens: int = 0
    merged_bytes: int = 0
    merged_share: float = 0.0
    switch_s: float = 0.0
    switched_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeCosts:
    """What is known before anything is seen.

    `step` are this machine's measured figures, None if it was not measured. `merge_s` are the
    seconds to merge one adapter into everything (None: not known). Restoring is taken to be free.
    Switching takes at most `budget_share` of a step's seconds beside each step.
    """

    step: StepCosts | None = None
    merge_s: float | None = None
    budget_share: float = 0.1


class MergePolicy(Protocol):
    """Decides what to merge; asked before a step, or less often, and told of each step."""

    def decide(self, view: MergeView) -> MergeDecision:
        """What to work towards. The target is None or in `view.mergeable`; `only` is None or names
        at least one of the requests."""
        ...

    def saw_step(self, seen: StepSeen) -> None:
        """A step was taken."""
        ...


def rows_by_adapter(requests: Iterable[OpenRequest]) -> dict[AdapterKey | None, list[OpenRequest]]:
    """Requests of each adapter; adapters and requests in the order given."""
    groups: dict[AdapterKey | None, list[OpenRequest]] = {}
    for request in requests:
        groups.setdefault(request.adapter, []).append(request)
    return groups
