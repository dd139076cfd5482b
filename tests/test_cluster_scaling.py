"""Autoscaling: up by queue time, down by packing, neither to and fro."""

from __future__ import annotations

import pytest

from loraswarm.cluster.scaling import (
    Autoscaler,
    Drain,
    Reopen,
    ScalingRules,
    Start,
    fits_without_one,
    queue_s,
)
from loraswarm.errors import ConfigError
from routing_cases import LIMITS, decoding, request, view_of

RULES = ScalingRules(min_replicas=1, max_replicas=4, target_wait_s=2.0)
PAUSE_S = 1000.0


def busy_view(num_replicas, num_open, expected=10):
    view = view_of(num_replicas)
    for replica in view.replicas.values():
        for _ in range(num_open):
            decoding(replica, expected=expected)
    return view


def accepting(view):
    return [each for each in view.replicas.values() if each.accepts]


def test_limits_that_cannot_be_are_refused_by_name():
    with pytest.raises(ConfigError, match="--min-replicas is 0"):
        ScalingRules(min_replicas=0, max_replicas=2)
    with pytest.raises(ConfigError, match=r"--max-replicas is 1.*\(2\)"):
        ScalingRules(min_replicas=2, max_replicas=1)


def test_what_is_missing_to_the_minimum_is_started_at_once():
    scaler = Autoscaler(ScalingRules(min_replicas=3, max_replicas=4))
    assert scaler.decide(view_of(1)) == Start(2)
    assert scaler.decide(view_of(1), num_starting=2) is None
    assert scaler.decide(view_of(0), num_starting=1) == Start(2)


def test_more_are_started_when_a_request_would_wait_too_long():
    view = busy_view(2, LIMITS.num_seats, expected=5)
    scaler = Autoscaler(RULES)
    assert queue_s(view, accepting(view)) < RULES.target_wait_s
    assert scaler.decide(view) is None
    for _ in range(60):
        decoding(view.replicas["r0"], expected=50)
        decoding(view.replicas["r1"], expected=50)
    assert queue_s(view, accepting(view)) > 2 * RULES.target_wait_s
    assert scaler.decide(view) == Start(2), "at most as many again"
    view.now_s += RULES.up_pause_s / 2
    assert scaler.decide(view) is None, "it acted a moment ago"
    view.now_s += RULES.up_pause_s
    assert scaler.decide(view, num_starting=2) is None, "enough are coming"
    assert scaler.decide(view, num_starting=1) == Start(1)


def test_there_are_never_more_than_the_maximum():
    view = busy_view(4, 70, expected=50)
    assert queue_s(view, accepting(view)) > RULES.target_wait_s
    assert Autoscaler(RULES).decide(view) is None


def test_a_draining_replica_is_reopened_before_another_is_started():
    view = busy_view(3, 70, expected=50)
    view.replicas["r1"].accepts = view.replicas["r2"].accepts = False
    decoding(view.replicas["r2"])
    assert Autoscaler(RULES).decide(view, draining=["r1", "r2"]) == Reopen("r2")


def test_the_lightest_is_drained_when_the_others_have_room_for_all_for_a_while():
    view = busy_view(4, 1)
    decoding(view.replicas["r0"])
    assert fits_without_one(accepting(view), view, RULES.fill_share)
    scaler = Autoscaler(RULES)
    assert scaler.decide(view) is None, "not at once"
    view.now_s += RULES.patience_s
    view.set_tier("r1", "small", "device")
    assert scaler.decide(view) == Drain("r2"), "r1 alone holds an adapter"
    view.replicas["r2"].accepts = False
    view.replicas["r0"].remove("r0-1")
    assert fits_without_one(accepting(view), view, RULES.fill_share)
    scaler.decide(view, draining=["r2"])
    view.now_s += PAUSE_S
    assert scaler.decide(view, draining=["r2"]) is None, "one after the other"


def test_a_break_in_between_begins_the_patience_anew():
    view = busy_view(2, 1)
    scaler = Autoscaler(RULES)
    scaler.decide(view)
    view.now_s += RULES.patience_s - 1
    decoding(view.replicas["r0"])
    assert not fits_without_one(accepting(view), view, RULES.fill_share), "3 of 4 seats"
    scaler.decide(view)
    view.replicas["r0"].remove("r0-1")
    view.now_s += 1
    assert scaler.decide(view) is None
    view.now_s += RULES.patience_s
    assert scaler.decide(view) == Drain("r0")


def test_a_wait_in_between_begins_the_patience_anew():
    view = busy_view(2, 1)
    rules = ScalingRules(min_replicas=1, max_replicas=2)
    scaler = Autoscaler(rules)
    scaler.decide(view)
    for name, replica in view.replicas.items():
        replica.add(request(f"long-{name}", prompt=1, prefill=100_000))
    view.replicas["r1"].remove("r1-0")
    view.replicas["r0"].remove("r0-0")
    view.now_s += rules.patience_s
    assert queue_s(view, accepting(view)) > rules.target_wait_s
    assert fits_without_one(accepting(view), view, rules.fill_share)
    assert scaler.decide(view) is None
    for name, replica in view.replicas.items():
        replica.remove(f"long-{name}")
    view.now_s += 1
    assert scaler.decide(view) is None
    view.now_s += rules.patience_s
    assert scaler.decide(view) == Drain("r0")


def test_nothing_is_drained_soon_after_a_start_nor_below_the_minimum():
    rules = ScalingRules(min_replicas=2, max_replicas=4, patience_s=1.0)
    scaler = Autoscaler(rules)
    view = view_of(1)
    assert scaler.decide(view) == Start(1)
    view = view_of(3)
    scaler.decide(view)
    view.now_s = rules.down_pause_s - 1
    assert scaler.decide(view) is None
    view.now_s = rules.down_pause_s
    assert scaler.decide(view) == Drain("r0")
    low = Autoscaler(rules)
    view = view_of(2)
    low.decide(view)
    view.now_s += PAUSE_S
    assert low.decide(view) is None


def test_pages_count_as_seats_do():
    view = busy_view(2, 0)
    decoding(view.replicas["r0"], prompt=1100)
    assert fits_without_one(accepting(view), view, 0.7)
    decoding(view.replicas["r0"], prompt=100)
    assert not fits_without_one(accepting(view), view, 0.7)


def test_load_that_comes_and_goes_within_the_patience_moves_nothing():
    """A square wave of load: one more replica at most, never a drain."""
    view = busy_view(2, 1, expected=50)
    scaler = Autoscaler(RULES)
    actions = []
    for second in range(200):
        view.now_s = float(second)
        if second % 20 == 10:
            for _ in range(2):
                decoding(view.replicas["r0"])
        if second % 20 == 15:
            for name in list(view.replicas["r0"].requests)[1:]:
                view.replicas["r0"].remove(name)
        if action := scaler.decide(view):
            actions.append(action)
    assert actions == []
