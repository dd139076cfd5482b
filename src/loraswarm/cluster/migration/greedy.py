"""The default solver: spreads what is too much, then searches locally, within a time limit.

Every replica above the bound of the makespan sheds the requests whose moves are cheapest for what
they take off; each goes where the load stays lowest. Then the most loaded replica gives a request
away or exchanges one, as long as that lowers the larger load of the two. At the end of that, some
requests are placed at random and the search is repeated; the best placement counts. Nothing is
random but for a fixed seed: a problem has one answer unless the time limit cuts the search short.
How near that comes to the best placement: benchmarks/migration_solvers.py.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import numpy as np

from loraswarm.cluster.migration.bound import Bound
from loraswarm.cluster.migration.objective import (
    MEAN_WEIGHT,
    Floats,
    Found,
    Indexed,
    Ints,
    solution_of,
)
from loraswarm.cluster.migration.placement import Placement
from loraswarm.cluster.migration.problem import MigrationProblem, Solution

NUM_ROUNDS = 50
TIME_LIMIT_S = 0.012
NUM_SHEDDINGS = 4
PLACED_AT_ONCE = 32
KICKED = 3
"""Requests placed at random when the search is stuck, at most."""
MAX_LEAVERS = 256
MAX_PARTNERS = 256
NUM_TRIED = 4
LEAST_GAIN = 1e-9
TIE_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True)
class Greedy:
    """`num_rounds` placements at random follow the first search; 0: none."""

    num_rounds: int = NUM_ROUNDS
    seed: int = 0

    def solve(self, problem: MigrationProblem, time_limit_s: float = TIME_LIMIT_S) -> Solution:
        start_s = time.perf_counter()
        indexed = Indexed.of(problem)
        bound = Bound(indexed)
        search = _Search(Placement(indexed), indexed.columns.move_s, start_s + time_limit_s)
        search.shed(bound.makespan_s)
        search.descend()
        search.repeat(self.num_rounds, random.Random(self.seed), bound.objective_s)
        seconds = time.perf_counter() - start_s
        return solution_of(indexed, Found(search.best, bound.objective_s, seconds))


@dataclass
class _Search:
    """Changes `placement`; `best` is the best that it has been, from the start on."""

    placement: Placement
    _move_s: Floats
    end_s: float
    best: list[int] = field(init=False)
    best_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.best = list(self.placement.at)
        self.best_s = self.placement.objective_s()
        self._mean_weight = MEAN_WEIGHT / self.placement.num_replicas

    def shed(self, level_s: float) -> None:
        """Move requests off replicas whose load is above `level_s`, the longest first.

        Repeated, as what leaves changes what overflows and which adapters are needed. The time
        limit does not end it: it takes about 20 us for each move.
        """
        for _ in range(NUM_SHEDDINGS):
            leavers: list[int] = []
            for j in np.flatnonzero(self.placement.loads_s() > level_s).tolist():
                leavers += self._leavers(j, self.placement.load_s(j) - level_s)
            leavers.sort(key=lambda i: (-self.placement.out_s[i], i))
            for begin in range(0, len(leavers), PLACED_AT_ONCE):
                self._place(leavers[begin : begin + PLACED_AT_ONCE], level_s)
            self._keep()
            if not leavers:
                break

    def _leavers(self, replica: int, excess_s: float) -> list[int]:
        """Those whose moves cost least for what they take off, until that is `excess_s`."""
        placement = self.placement
        members = np.array(list(placement.members[replica]), dtype=np.int64)
        relief_s = placement.load_s(replica) - placement.load_without_s(replica, members)
        cost = self._move_s[members] / np.maximum(relief_s, 1e-30)
        found = []
        for place in np.argsort(cost, kind="stable").tolist():
            if excess_s <= 0.0:
                break
            if relief_s[place] <= 2.0 * excess_s:
                found.append(int(members[place]))
                excess_s -= float(relief_s[place])
        return found

    def _place(self, requests: list[int], level_s: float) -> None:
        """Each where its coming costs least among those that stay below the level, else where the
        load is least above. What one brings for another is seen in the next batch only."""
        placement = self.placement
        seconds, num_bytes = placement.entries(np.array(requests, dtype=np.int64))
        scores = self._mean_weight * seconds
        for i, in_s, in_bytes, score in zip(requests, seconds, num_bytes, scores, strict=True):
            after_s = placement.base_s + in_s
            after_s += placement.overflow_s(placement.used_bytes + in_bytes)
            score += np.maximum(after_s, level_s) + TIE_WEIGHT * after_s
            score[placement.at[i]] = np.inf
            target = int(score.argmin())
            if after_s[target] < placement.load_s(placement.at[i]):
                self._try_move(i, target)

    def _try_move(self, request: int, target: int) -> None:
        source = self.placement.at[request]
        self.placement.move(request, target)
        if not self.placement.fits(target):
            self.placement.move(request, source)

    def descend(self) -> None:
        """Until the most loaded replica can neither give a request nor exchange one."""
        while time.perf_counter() < self.end_s:
            if not self._improve(int(self.placement.loads_s().argmax())):
                break
            self._keep()

    def repeat(self, num_rounds: int, chance: random.Random, bound_s: float) -> None:
        """Place some requests at random and descend again, from the best so far."""
        for _ in range(num_rounds):
            is_done = self.best_s <= bound_s * (1.0 + LEAST_GAIN)
            if is_done or time.perf_counter() >= self.end_s:
                break
            self._return_to_best()
            self._kick(chance)
            self.descend()

    def _keep(self) -> None:
        objective_s = self.placement.objective_s()
        if objective_s < self.best_s:
            self.best_s = objective_s
            self.best = list(self.placement.at)

    def _return_to_best(self) -> None:
        for i, j in enumerate(self.best):
            if self.placement.at[i] != j:
                self.placement.move(i, j)

    def _kick(self, chance: random.Random) -> None:
        placement = self.placement
        fullest = list(placement.members[int(placement.loads_s().argmax())])
        for _ in range(chance.randint(1, KICKED)):
            is_of_fullest = bool(fullest) and chance.random() < 0.5
            i = chance.choice(fullest) if is_of_fullest else chance.randrange(len(placement.at))
            seconds, _ = placement.entries(np.array([i]))
            open_to = np.flatnonzero(np.isfinite(seconds[0]))
            target = int(open_to[chance.randrange(len(open_to))]) if len(open_to) else -1
            if target not in (-1, placement.at[i]):
                placement.move(i, target)

    def _improve(self, fullest: int) -> bool:
        placement = self.placement
        leavers = np.array(list(placement.members[fullest]), dtype=np.int64)
        if not len(leavers):
            return False
        if len(leavers) > MAX_LEAVERS:
            order = np.argsort(-placement.out_s[leavers], kind="stable")
            leavers = leavers[order[:MAX_LEAVERS]]
        seconds, num_bytes = placement.entries(leavers)
        if self._give(fullest, leavers, seconds, num_bytes):
            return True
        return self._exchange(fullest, leavers, seconds, num_bytes)

    def _give(self, fullest: int, leavers: Ints, seconds: Floats, num_bytes: Floats) -> bool:
        """Move one of `leavers` where the larger of the two loads becomes smallest."""
        placement = self.placement
        in_s = placement.base_s + seconds
        in_s += placement.overflow_s(placement.used_bytes + num_bytes)
        in_s[:, fullest] = np.inf
        out_s = placement.load_without_s(fullest, leavers)[:, None]
        larger = np.maximum(in_s, out_s)
        score = larger + self._mean_weight * (in_s - placement.loads_s() + out_s)
        row, target = np.unravel_index(int(score.argmin()), score.shape)
        before_s = placement.load_s(fullest) * (1.0 - LEAST_GAIN)
        if not float(score[row, target]) < before_s + self._mean_weight * before_s:
            return False
        if not float(larger[row, target]) < before_s:
            return False
        placement.move(int(leavers[row]), int(target))
        return True

    def _exchange(self, fullest: int, leavers: Ints, seconds: Floats, num_bytes: Floats) -> bool:
        """Exchange one of `leavers` with a request elsewhere, if the larger load falls.

        Candidates are judged as if the two had no adapter in common; the best are then tried.
        """
        placement = self.placement
        partners = self._partners(fullest)
        if not len(partners):
            return False
        back_s, back_bytes = placement.entries_at(fullest, partners)
        at = np.array([placement.at[i] for i in partners], dtype=np.int64)
        there_s = placement.base_s[at] - placement.out_s[partners] + seconds[:, at]
        there_bytes = placement.used_bytes[at] - placement.out_bytes[partners] + num_bytes[:, at]
        there_s += placement.overflow_s(there_bytes, at)
        here_s = placement.base_s[fullest] - placement.out_s[leavers][:, None] + back_s
        here_bytes = placement.used_bytes[fullest] - placement.out_bytes[leavers][:, None]
        here_s += placement.overflow_s(here_bytes + back_bytes, fullest)
        larger = np.maximum(there_s, here_s)
        score = larger + self._mean_weight * (there_s - placement.loads_s()[at] + here_s)
        before_s = placement.load_s(fullest) * (1.0 - LEAST_GAIN)
        num_tried = min(NUM_TRIED, score.size)
        for place in np.argpartition(score, num_tried - 1, axis=None)[:num_tried]:
            row, column = np.unravel_index(int(place), score.shape)
            if not float(larger[row, column]) < before_s:
                continue
            if self._try_exchange(int(leavers[row]), int(partners[column]), before_s):
                return True
        return False

    def _partners(self, fullest: int) -> Ints:
        """Requests elsewhere, of the least loaded replicas first."""
        found: list[int] = []
        for j in np.argsort(self.placement.loads_s(), kind="stable"):
            if j != fullest and len(found) < MAX_PARTNERS:
                found += self.placement.members[int(j)]
        return np.array(found, dtype=np.int64)

    def _try_exchange(self, leaver: int, partner: int, before_s: float) -> bool:
        placement = self.placement
        here, there = placement.at[leaver], placement.at[partner]
        placement.move(leaver, there)
        placement.move(partner, here)
        larger = max(placement.load_s(here), placement.load_s(there))
        if larger < before_s and placement.fits(here) and placement.fits(there):
            return True
        placement.move(partner, there)
        placement.move(leaver, here)
        return False
