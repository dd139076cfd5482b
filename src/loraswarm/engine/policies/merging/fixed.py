"""The two policies without a judgement: nothing is ever merged; the oldest request's adapter is.

Both know nothing about costs.
"""

from __future__ import annotations

from loraswarm.engine.policies.merging.view import (
    NOTHING_MERGED,
    MergeDecision,
    MergeView,
    StepSeen,
)


class Never:
    """Everything runs unmerged."""

    def decide(self, view: MergeView) -> MergeDecision:
        return NOTHING_MERGED

    def saw_step(self, seen: StepSeen) -> None:
        pass


class AlwaysHead:
    """The adapter of the oldest request is merged, and its requests alone run, as with PEFT.

    Adapters that cannot be merged, and the base, run alone with nothing merged. A request waits
    for those that came before it and for those of the same adapters: it is the oldest at last.
    """

    def decide(self, view: MergeView) -> MergeDecision:
        if not view.requests:
            return MergeDecision(view.target if view.target in view.mergeable else None)
        head = view.requests[0].adapter
        alike = [request.request_id for request in view.requests if request.adapter == head]
        only = None if len(alike) == len(view.requests) else frozenset(alike)
        return MergeDecision(head if head in view.mergeable else None, only)

    def saw_step(self, seen: StepSeen) -> None:
        pass
