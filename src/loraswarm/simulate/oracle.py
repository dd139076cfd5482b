"""The best times to switch, known afterwards: dynamic programming over the steps of a run.

State: the adapter that is merged, or none. It assumes that steps do the same work whatever is
merged, that a switch happens at once (no budget) and takes all its seconds, that only the adapters
with the most tokens are worth a state, and that a second of a step delays every request that ends
later in the same busy time. What it finds is replayed, so that its figures are those of a run like
any other; they are what is known to be reachable, no bound.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.policies.merging import MergeDecision, MergeView, StepSeen, make_policy
from loraswarm.simulate.machine import Machine
from loraswarm.simulate.replay import Replay, Run, TakenStep
from loraswarm.simulate.traces import Trace

NUM_ROUNDS = 2
MAX_ADAPTERS = 16
AT_ONCE = 1e9
State = AdapterKey | None
Schedule = list[tuple[int, State]]
"""From so many computed tokens on this is merged; ascending. Tokens are a clock that does not run
differently when steps take less time."""


class Oracle:
    """Follows a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self._starts = [num_tokens for num_tokens, _ in schedule]
        self._states = [state for _, state in schedule]
        self._num_tokens = 0

    def decide(self, view: MergeView) -> MergeDecision:
        place = bisect_right(self._starts, self._num_tokens) - 1
        return MergeDecision(self._states[place] if place >= 0 else None)

    def saw_step(self, seen: StepSeen) -> None:
        self._num_tokens += seen.work.num_tokens


def run_oracle(trace: Trace, machine: Machine) -> Run:
    """The best of what the schedules of some rounds come to, and of nothing merged at all.

    Each round plans by the steps of the one before.
    """
    best = run = Replay(trace, machine, make_policy("never")).run()
    for _ in range(NUM_ROUNDS):
        policy = Oracle(best_schedule(run, machine, adapter_bytes(trace, machine)))
        run = Replay(trace, machine, policy, AT_ONCE).run()
        best = min(best, run, key=_total_latency_s)
    return best


def adapter_bytes(trace: Trace, machine: Machine) -> dict[AdapterKey, int]:
    """Bytes in pages of the adapters of a trace."""
    return {info.key: machine.bytes_of(info) for info in machine.infos_of(trace.ranks)}


def best_schedule(run: Run, machine: Machine, sizes: dict[AdapterKey, int]) -> Schedule:
    """What to merge when, had the steps of `run` to be taken again."""
    totals: Counter[AdapterKey] = Counter()
    for step in run.steps:
        totals.update(step.hot_tokens)
    states: list[State] = [None, *(key for key, _ in totals.most_common(MAX_ADAPTERS))]
    seconds = np.array([_seconds(step, states, machine, sizes) for step in run.steps])
    weights = _delayed(run)
    places = cheapest_path(weights[:, None] * seconds, weights * machine.merge_s)
    schedule: Schedule = []
    num_tokens = 0
    for step, place in zip(run.steps, places, strict=True):
        if not schedule or schedule[-1][1] != states[place]:
            schedule.append((num_tokens, states[place]))
        num_tokens += step.work.num_tokens
    return schedule


def cheapest_path(cost_KS: NDArray[np.float64], switch_K: NDArray[np.float64]) -> list[int]:
    """A state for each step k with the least sum of `cost[k, state]`.

    To be in a state other than 0 and than that of the step before costs `switch[k]` more; state 0
    is entered for nothing, and is where it begins.
    """
    num_steps, num_states = cost_KS.shape
    total_S = np.full(num_states, np.inf)
    total_S[0] = 0.0
    came_KS = np.zeros((num_steps, num_states), dtype=np.int64)
    for k in range(num_steps):
        cheapest = int(total_S.argmin())
        entered_S = np.full(num_states, total_S[cheapest] + switch_K[k])
        entered_S[0] = total_S[cheapest]
        stays_S = total_S <= entered_S
        came_KS[k] = np.where(stays_S, np.arange(num_states), cheapest)
        total_S = np.where(stays_S, total_S, entered_S) + cost_KS[k]
    path = [int(total_S.argmin())]
    for k in range(num_steps - 1, 0, -1):
        path.append(int(came_KS[k, path[-1]]))
    return path[::-1]


def _seconds(
    step: TakenStep, states: Sequence[State], machine: Machine, sizes: dict[AdapterKey, int]
) -> list[float]:
    """What a step takes in each state."""
    return [
        machine.step_s(step.work, 0, 0, 0.0)
        if state is None
        else machine.step_s(step.work, step.hot_tokens.get(state, 0), sizes[state], 1.0)
        for state in states
    ]


def _delayed(run: Run) -> NDArray[np.float64]:
    """Requests that a second of each step delays: those that end later in the same busy time."""
    ends = sorted(served.end_s for served in run.served)
    weights = np.empty(len(run.steps))
    begin = 0
    for place, step in enumerate(run.steps):
        is_last = place + 1 == len(run.steps) or run.steps[place + 1].start_s > step.end_s + 1e-9
        if not is_last:
            continue
        num_ended = bisect_right(ends, step.end_s)
        for each in range(begin, place + 1):
            weights[each] = num_ended - bisect_right(ends, run.steps[each].start_s)
        begin = place + 1
    return weights


def _total_latency_s(run: Run) -> float:
    return sum(served.latency_s for served in run.served)
