"""Merge policies: what each merges, whom it lets run, and that none starves or merges for ever."""

from __future__ import annotations

import random

import pytest

from loraswarm.engine.policies.merging import NAMES, MergeCosts, make_policy
from loraswarm.engine.policies.merging.cost import CostPolicy
from loraswarm.errors import ConfigError
from merge_cases import MEASURED, STEP_S, key, requests_of, view_of

A, B = key("a"), key("b")


def decided(policy, view, num_steps=1):
    """The last of so many decisions, each followed by a step's time and carried out at once."""
    for step in range(num_steps):
        now = view_of(
            "",
            requests=view.requests,
            now_s=step * STEP_S,
            target=view.target,
            merged=view.merged,
            merged_share=view.merged_share,
            mergeable="".join(name for name, _ in view.mergeable),
        )
        decision = policy.decide(now)
    return decision


@pytest.mark.parametrize("name", NAMES)
def test_targets_can_be_merged_and_someone_may_run(name):
    rng = random.Random(7)
    policy = make_policy(name, MEASURED)
    target = None
    for step in range(300):
        names = "".join(rng.choice("aaaabc.") for _ in range(rng.choice([0, 1, 3, 7, 40])))
        mergeable = rng.choice(["abc", "bc", "a", ""])
        view = view_of(
            names,
            step * STEP_S,
            mergeable,
            target=target if step % 3 else A,
            merged=target,
            merged_share=0.5 if target else 0.0,
        )
        decision = policy.decide(view)
        assert decision.target is None or decision.target in view.mergeable
        ids = {request.request_id for request in view.requests}
        assert decision.only is None or (decision.only and decision.only <= ids)
        target = decision.target


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'best'.*never, always-head, dlora, cost"):
        make_policy("best")


def test_never_merges_nothing_and_excludes_nobody():
    decision = make_policy("never").decide(view_of("a" * 133))
    assert (decision.target, decision.only) == (None, None)


def test_always_head_runs_the_oldest_requests_adapter_alone():
    policy = make_policy("always-head")
    decision = policy.decide(view_of("babab."))
    assert decision.target == B
    assert decision.only == {"b0", "b2", "b4"}
    decision = policy.decide(view_of(".ba."))
    assert decision.target is None
    assert decision.only == {".0", ".3"}
    assert policy.decide(view_of("aaa")).only is None
    assert policy.decide(view_of("ab", mergeable="b")).target is None


class TestCost:
    """The policy with a cost model."""

    def test_one_adapter_alone_is_merged(self):
        assert decided(CostPolicy(MEASURED), view_of("a" * 8), 3).target == A

    def test_a_mix_of_equals_is_not(self):
        assert decided(CostPolicy(MEASURED), view_of("abcdefgh" * 2), 20).target is None

    def test_base_rows_count_against_merging(self):
        assert decided(CostPolicy(MEASURED), view_of("a" * 5 + "." * 11), 20).target is None
        assert decided(CostPolicy(MEASURED), view_of("a" * 15 + "."), 20).target == A

    def test_what_ends_before_a_switch_pays_is_not_merged(self):
        short = view_of("", requests=requests_of("a" * 8, outputs=3))
        assert decided(CostPolicy(MEASURED), short, 1).target is None

    def test_what_is_merged_stays_while_others_pass_by(self):
        view = view_of("a" * 12 + "b", target=A, merged=A, merged_share=1.0)
        assert decided(CostPolicy(MEASURED), view, 20).target == A

    def test_what_is_merged_is_given_up_when_others_have_come(self):
        view = view_of("a" + "b" * 12, target=A, merged=A, merged_share=1.0)
        assert decided(CostPolicy(MEASURED), view, 20).target == B
        view = view_of("abcdefgh", target=A, merged=A, merged_share=1.0)
        assert decided(CostPolicy(MEASURED), view, 20).target is None

    def test_an_idle_engine_keeps_what_is_merged(self):
        view = view_of("", target=A, merged=A, merged_share=1.0)
        assert decided(CostPolicy(MEASURED), view, 20).target == A

    def test_what_can_no_longer_be_merged_is_given_up(self):
        view = view_of("a" * 9, mergeable="b", target=A, merged=A, merged_share=1.0)
        assert CostPolicy(MEASURED).decide(view).target is None
        idle = view_of("", mergeable="", target=A, merged=A, merged_share=1.0)
        assert CostPolicy(MEASURED).decide(idle).target is None

    def test_a_dearer_switch_needs_a_longer_gain(self):
        view = view_of("", requests=requests_of("a" * 8, outputs=60))
        cheap = CostPolicy(MergeCosts(step=MEASURED.step, merge_s=0.1))
        dear = CostPolicy(MergeCosts(step=MEASURED.step, merge_s=10.0))
        assert decided(cheap, view).target == A
        assert decided(dear, view).target is None

    def test_nobody_is_ever_excluded(self):
        policy, rng = CostPolicy(MEASURED), random.Random(3)
        target = None
        for step in range(500):
            names = "a" * rng.randrange(40) + "".join(rng.choice("bcd.") for _ in range(3))
            view = view_of(names, step * STEP_S, target=target, merged=target, merged_share=1.0)
            decision = policy.decide(view)
            assert decision.only is None
            target = decision.target

    def test_a_tie_at_the_margin_does_not_flap(self):
        policy, rng, target, changes = CostPolicy(MEASURED), random.Random(5), None, 0
        for step in range(400):
            num = 8 + rng.randrange(-1, 2)
            view = view_of(
                "a" * num + "b" * (16 - num),
                step * STEP_S,
                target=target,
                merged=target,
                merged_share=1.0 if target else 0.0,
            )
            decision = policy.decide(view)
            changes += decision.target != target
            target = decision.target
        assert changes <= 4

    def test_a_cheap_switch_does_not_follow_every_request_either(self):
        policy = CostPolicy(MergeCosts(step=MEASURED.step, merge_s=0.02))
        rng, target, changes = random.Random(5), None, 0
        for step in range(400):
            num = 8 + rng.randrange(-1, 2)
            requests = requests_of("a" * num + "b" * (16 - num), outputs=20)
            state = {"target": target, "merged": target, "merged_share": float(target is not None)}
            view = view_of("", step * STEP_S, requests=requests, **state)
            decision = policy.decide(view)
            changes += decision.target != target
            target = decision.target
        assert changes <= 6

    def test_what_is_learned_counts_though_the_same_requests_are_open(self):
        policy, view = CostPolicy(MergeCosts()), view_of("a" * 8)
        assert policy.decide(view).target is None
        policy.learned.lora, policy.learned._lora_variance = 10.0, 0.0
        targets = [policy.decide(view).target for _ in range(8)]
        assert targets == [None] * 7 + [A]

    def test_a_burst_is_seen_within_a_few_steps(self):
        policy = CostPolicy(MEASURED)
        for step in range(100):
            policy.decide(view_of("bcdefgh", step * STEP_S))
        burst = requests_of("a" * 24 + "bcd", outputs=200)
        for num_steps in range(1, 6):
            view = view_of("", requests=burst, now_s=(100 + num_steps) * STEP_S)
            if policy.decide(view).target == A:
                break
        assert num_steps <= 3
