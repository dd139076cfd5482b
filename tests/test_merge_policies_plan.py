"""Plans of what to merge over the intervals ahead: as good as the best of all, and not put off."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from loraswarm.engine.policies.merging.plan import Plan, Prospect, best_plan
from merge_cases import key

A, B = key("a"), key("b")


def saved_by(states, first_share, prospect):
    """Seconds that a sequence of states saves, interval by interval."""
    plan, before = Plan(), states[0]
    share = first_share
    for state in states:
        plan = plan.extended(state, share if state == before else 0.0, prospect)
        share, before = plan.share, state
    return plan.seconds


def test_a_plan_is_the_best_of_all_where_switches_are_done_within_an_interval():
    rng = np.random.default_rng(1)
    for _ in range(30):
        gains = {name: rng.normal(size=5).tolist() for name in (A, B)}
        prospect = Prospect(gains_s=gains, growth=[7.0] * 5, merge_s=0.5)
        for first in (None, A, B):
            best = max(
                saved_by((first, *rest), 0.0, prospect)
                for rest in itertools.product((None, A, B), repeat=4)
            )
            assert best_plan(first, 0.0, prospect).seconds == pytest.approx(best, rel=0.05)


def test_what_pays_in_the_end_is_begun_at_once():
    prospect = Prospect(gains_s={A: [0.1] * 5}, growth=[0.3] * 5, merge_s=0.2)
    now, later = (best_plan(first, 0.0, prospect) for first in (A, None))
    assert now.states == (A,) * 5
    assert now.seconds > later.seconds > 0.0


def test_what_is_merged_already_is_not_paid_again():
    prospect = Prospect(gains_s={A: [0.01] * 3}, growth=[1.0] * 3, merge_s=0.2)
    assert best_plan(A, 1.0, prospect).seconds == pytest.approx(0.03)
    assert best_plan(A, 0.0, prospect).seconds < 0.0
    assert best_plan(None, 0.0, prospect).states == (None,) * 3


def test_an_adapter_that_is_wanted_again_gives_way_and_comes_back():
    gains = {A: [-1.0, 1.0, 1.0], B: [1.0, -1.0, -1.0]}
    prospect = Prospect(gains_s=gains, growth=[100.0] * 3, merge_s=0.1)
    assert best_plan(B, 0.0, prospect).states == (B, A, A)
    assert best_plan(B, 0.0, prospect).seconds > best_plan(A, 1.0, prospect).seconds
