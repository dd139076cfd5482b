"""dLoRA's two algorithms: a trace worked out by hand with the published code's constants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loraswarm.engine.policies.merging.dlora import Dlora
from loraswarm.engine.policies.merging.dlora_thresholds import (
    DLORA_ARTIFACT,
    STARVED_S,
    Thresholds,
    measured_constants,
)
from loraswarm.engine.policies.merging.view import MergeCosts
from merge_cases import COSTS, MEASURED, MEGABYTE, key, view_of

A, B = key("a"), key("b")


def credits_of(policy):
    return policy.credit(A), policy.credit(B)


def test_golden_trace_of_both_algorithms_with_the_artifacts_constants():
    """Two adapters begin with 10,000 credits; ratio of speeds 5/9, so a batch's credit is .1125."""
    policy = Dlora(MergeCosts(), DLORA_ARTIFACT)
    # 12 of 16 for a: fewer than alpha = 1.0 of a batch, so all run by age.
    decision = policy.decide(view_of("aaabaaabaaabaaab"))
    assert (decision.target, decision.only) == (None, None)
    assert credits_of(policy) == (10_000.0, 10_000.0)
    # 12 of 14: by age still. So far merged steps would have served 24, unmerged ones 30.
    decision = policy.decide(view_of("aaabaaabaaaaaa"))
    assert (decision.target, decision.only) == (None, None)
    assert policy.thresholds.num_steps == 2
    # 20 of a in the queue make a batch: a is merged. Before, two unmerged steps are judged:
    # merged 24 / (2 * .015 + .02 * 1) = 480 > 30 / (2 * .027 + .02) = 405, so beta falls by 1.1.
    # a15 runs in place of b15, the sixteenth by age: a pays .1125, b gets it.
    decision = policy.decide(view_of("a" * 15 + "b" + "a" * 5))
    assert decision.target == A
    assert decision.only == {f"a{place}" for place in (*range(15), 16)}
    assert policy.thresholds.beta == pytest.approx(0.015 / 0.027 / 1.1)
    assert policy.thresholds.alpha == 1.0
    assert credits_of(policy) == pytest.approx((9_999.8875, 10_000.1125))
    # 9 of 16 are more than beta = .505 of them: a stays, and for each of 7 of b pays half of .1125.
    decision = policy.decide(view_of("ab" * 7 + "aa", target=A))
    assert decision.target == A
    assert decision.only == {f"a{place}" for place in (0, 2, 4, 6, 8, 10, 12, 14, 15)}
    assert credits_of(policy) == pytest.approx((9_999.49375, 10_000.50625))
    # 8 of 16 are less: by age again. Two merged steps are judged: 16 + 9 + 8 in
    # 2 * .015 + .02 = 660 a second, against 48 / .054 = 889, so alpha grows by 1.1.
    decision = policy.decide(view_of("ab" * 8, target=A))
    assert (decision.target, decision.only) == (None, None)
    assert policy.thresholds.alpha == pytest.approx(1.1)
    assert policy.thresholds.beta == pytest.approx(0.015 / 0.027 / 1.1)
    assert credits_of(policy) == pytest.approx((9_999.49375, 10_000.50625))


def test_credit_goes_to_whom_the_pairs_say_even_if_it_was_not_displaced():
    policy = Dlora(MergeCosts(), DLORA_ARTIFACT)
    policy.decide(view_of("b" + "a" * 20))
    # b0 is displaced; but a16, who runs out of turn, is paired with a15, who is sixteenth by age.
    assert credits_of(policy) == (10_000.0, 10_000.0)


def test_the_starved_run_first_until_they_have_half_their_credit_again():
    constants = replace(DLORA_ARTIFACT, credit_span=0.3, credit_kept=0.15, batch=4)
    policy = Dlora(MergeCosts(), constants)
    flood = "aaab" + "a" * 8
    targets = [policy.decide(view_of(flood)).target for _ in range(5)]
    assert targets == [A] * 5
    # The first gave b .1125, and the others, in which all of a runs, half of it each: it has .3375
    # more than at first, at least the span of .3.
    assert credits_of(policy) == pytest.approx((0.3 - 0.3375, 0.3 + 0.3375))
    # b3 runs, and of the others the oldest three; nobody is displaced.
    decision = policy.decide(view_of(flood))
    assert decision.target is None
    assert decision.only == {"a0", "a1", "a2", "b3"}
    # b is served until it has less than .15 above its first credits; a has too little to be merged.
    assert policy.decide(view_of("a" * 12)).target is None
    # The starved come before all others, not only in their turn.
    assert policy.decide(view_of("a" * 11 + "b")).only == {"a0", "a1", "a2", "b11"}


def test_thresholds_move_only_within_each_other():
    thresholds = Thresholds(replace(DLORA_ARTIFACT, first_alpha=0.6))
    thresholds.num_steps = 1
    thresholds.count(16, 16)
    thresholds.tune(is_merged=True)  # 16 / .035 < 16 / .027
    assert thresholds.alpha == pytest.approx(0.66)
    thresholds.num_steps = 100
    thresholds.count(16, 16)
    thresholds.tune(is_merged=True)  # merged was better
    assert thresholds.alpha == pytest.approx(0.61)
    for _ in range(3):
        thresholds.count(16, 16)
        thresholds.tune(is_merged=True)
    assert thresholds.alpha == pytest.approx(0.56)  # .51 would be below beta
    thresholds.count(1, 16)
    thresholds.tune(is_merged=False)
    assert thresholds.beta == pytest.approx(0.015 / 0.027)  # no room below alpha
    thresholds.num_steps = 0
    thresholds.count(1, 16)
    thresholds.tune(is_merged=True)  # no step was taken
    assert thresholds.alpha == pytest.approx(0.56)


def test_measured_constants_are_those_of_the_machine():
    constants = measured_constants(COSTS, 0.1, 16, 20 * MEGABYTE)
    assert constants.merged_s == pytest.approx(0.03 + 16 * 0.001)
    lora_s = 0.001 + 4 * 0.0005 + 16 * 0.0001 + 4 * 20e6 * 1e-10 + 16 * 20e6 * 1e-11
    assert constants.unmerged_s == pytest.approx(constants.merged_s + lora_s)
    assert constants.batch_credit == pytest.approx(1 / (constants.speed_ratio * 16))


def test_measured_credits_end_the_wait_of_a_displaced_adapter_in_seconds():
    policy = Dlora(MEASURED)
    flood = "a" * 31 + "b" + "a" * 20
    decisions = [policy.decide(view_of(flood)) for _ in range(400)]
    ran = [decision.only is None or "b31" in decision.only for decision in decisions]
    displaced_s = ran.index(True) * policy.thresholds.constants.merged_s
    assert 1.0 < displaced_s <= STARVED_S + 1.0


def test_what_cannot_be_merged_is_no_candidate():
    policy = Dlora(MergeCosts(), DLORA_ARTIFACT)
    decision = policy.decide(view_of("a" * 20, mergeable=""))
    assert decision.target is None
    assert policy.decide(view_of("." * 20)).target is None
