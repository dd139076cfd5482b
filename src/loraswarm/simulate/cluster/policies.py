"""Policies by name: a router of cluster/routing, and whether placement and migration go with it.

Knows no replicas. Asked by cluster, which carries out what is decided.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from loraswarm.cluster.migration.from_view import MigrationOptions, MigrationPlanner, problem_of
from loraswarm.cluster.migration.greedy import Greedy
from loraswarm.cluster.migration.move_costs import MoveCosts
from loraswarm.cluster.migration.pairs import MEASURED, DloraPairs
from loraswarm.cluster.migration.problem import MigrationProblem, Solution
from loraswarm.cluster.view import ClusterView
from loraswarm.errors import ConfigError

PAIRS_PERIOD_S = 10.0
GREEDY_PERIOD_S = 1.0
PLACEMENT_PERIOD_S = 10.0
SOLVE_LIMIT_S = 60.0
"""Never reached by what is solved here: what a run comes to must not depend on the machine."""
GREEDY_ROUNDS = 0
"""For the same reason the search is not repeated from other placements until its time is out."""
READING_S = 1e-4
"""What a reading of placement's clock is taken to be later than the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What decides in one run."""

    name: str
    router: str
    migration: Literal["pairs", "greedy"] | None = None
    has_placement: bool = False

    @property
    def migration_period_s(self) -> float:
        return PAIRS_PERIOD_S if self.migration == "pairs" else GREEDY_PERIOD_S


_POLICIES: Mapping[str, Policy] = {
    each.name: each
    for each in (
        Policy(name="round-robin", router="round-robin"),
        Policy(name="least-loaded", router="least-loaded"),
        Policy(name="punica", router="punica"),
        Policy(name="dlora-dispatch", router="dlora"),
        Policy(name="dlora", router="dlora", migration="pairs"),
        Policy(name="marginal", router="marginal"),
        Policy(name="ours", router="marginal", migration="greedy", has_placement=True),
    )
}
NAMES = tuple(_POLICIES)


def check_policies(names: Sequence[str]) -> tuple[Policy, ...]:
    """Raises ConfigError for an unknown one, one that comes twice, or one whose solver is not
    installed."""
    for name in names:
        if name not in _POLICIES:
            raise ConfigError(
                f"--policies has {name!r}; it must be of {', '.join(NAMES)}, joined by commas"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"--policies names one twice: {','.join(names)}")
    found = tuple(_POLICIES[name] for name in names)
    if any(each.migration == "pairs" for each in found) and find_spec("highspy") is None:
        raise ConfigError(
            "policy 'dlora' needs HiGHS: pip install 'loraswarm[cluster]', or leave it out of"
            " --policies"
        )
    return found


def make_migration(policy: Policy, costs: MoveCosts) -> Callable[[ClusterView], Solution | None]:
    """Answers moves to make now, or None; it is asked every `migration_period_s`.

    dLoRA's has its own rule of when to solve, and takes what it finds; K and V are never sent. It
    is given measured seconds, where its artifact has constants of another machine.
    """
    if policy.migration is None:
        return lambda view: None
    if policy.migration == "pairs":
        solver = DloraPairs(MEASURED)
        return lambda view: solver.solve(_with_all_tiers(view, costs), SOLVE_LIMIT_S)
    options = MigrationOptions(time_limit_s=SOLVE_LIMIT_S)
    return MigrationPlanner(Greedy(num_rounds=GREEDY_ROUNDS), costs, options).plan


def _with_all_tiers(view: ClusterView, costs: MoveCosts) -> MigrationProblem:
    """With idle adapters too: dLoRA lets a replica have as many adapters as it has in pages."""
    problem = problem_of(view, costs)
    rooms = (
        replace(each, tiers=dict(view.replicas[each.replica_id].tiers)) for each in problem.replicas
    )
    return replace(problem, replicas=tuple(rooms))


def counting_clock() -> Callable[[], float]:
    """Each reading is a little later, so that what is found in a given time is always the same."""
    readings = itertools.count()
    return lambda: READING_S * next(readings)
