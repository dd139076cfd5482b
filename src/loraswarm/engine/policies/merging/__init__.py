"""Which adapter is merged into the base when: policies by name. No torch, no clock.

A policy sees `MergeView`s and `StepSeen`s and answers `MergeDecision`s; the engine (or the
simulator) carries them out, a few layers beside each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loraswarm.engine.policies.merging.cost import CostPolicy
from loraswarm.engine.policies.merging.dlora import Dlora
from loraswarm.engine.policies.merging.fixed import AlwaysHead, Never
from loraswarm.engine.policies.merging.view import (
    MergeCosts,
    MergeDecision,
    MergePolicy,
    MergeView,
    OpenRequest,
    StepSeen,
)
from loraswarm.errors import ConfigError

__all__ = [
    "DEFAULT",
    "NAMES",
    "MergeCosts",
    "MergeDecision",
    "MergePolicy",
    "MergeView",
    "OpenRequest",
    "StepSeen",
    "make_policy",
]

DEFAULT = "cost"
_MAKERS: Mapping[str, Callable[[MergeCosts], MergePolicy]] = {
    "never": lambda costs: Never(),
    "always-head": lambda costs: AlwaysHead(),
    "dlora": Dlora,
    "cost": CostPolicy,
}
NAMES = tuple(_MAKERS)


def make_policy(name: str, costs: MergeCosts | None = None) -> MergePolicy:
    """A policy of its own for one engine.

    Raises   ConfigError naming the policies there are.
    """
    if name not in _MAKERS:
        raise ConfigError(f"merge policy is {name!r}; it must be one of {', '.join(NAMES)}")
    return _MAKERS[name](costs or MergeCosts())
