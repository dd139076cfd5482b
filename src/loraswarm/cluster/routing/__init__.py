"""Which replica serves a request: policies by name. No ray, no torch, no clock.

A policy sees a `ClusterView` and answers with a replica, or holds the request. The front carries it
out; the simulator asks the same policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loraswarm.cluster.routing.baselines import (
    DloraDispatch,
    LeastLoaded,
    PunicaPacking,
    RoundRobin,
)
from loraswarm.cluster.routing.marginal import MarginalCost
from loraswarm.cluster.routing.router import NO_PREFIX, KnownPrefix, PrefixTokens, Router
from loraswarm.errors import ConfigError

__all__ = [
    "DEFAULT",
    "NAMES",
    "NO_PREFIX",
    "KnownPrefix",
    "PrefixTokens",
    "Router",
    "make_router",
]

DEFAULT = "marginal"
_MAKERS: Mapping[str, Callable[[int], Router]] = {
    "round-robin": lambda seed: RoundRobin(),
    "least-loaded": lambda seed: LeastLoaded(),
    "punica": lambda seed: PunicaPacking(),
    "dlora": lambda seed: DloraDispatch(),
    "marginal": MarginalCost,
}
NAMES = tuple(_MAKERS)


def make_router(name: str, seed: int = 0) -> Router:
    """A policy of its own for one front; what it draws at random comes from `seed`.

    Raises   ConfigError naming the policies there are.
    """
    if name not in _MAKERS:
        raise ConfigError(f"routing policy is {name!r}; it must be one of {', '.join(NAMES)}")
    return _MAKERS[name](seed)
