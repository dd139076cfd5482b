"""The order in which things leave memory, by cost or by age, and the costs it goes by."""

from __future__ import annotations

import random

import pytest

from loraswarm.memory.costs import LOAD_STEPS, CostModel
from loraswarm.memory.eviction import EvictionOrder, EvictionRules

RULES = EvictionRules(burst_half_life_s=5.0, popular_half_life_s=200.0)


class Clock:
    """Stands still until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def drain(order):
    """All items in the order in which they leave."""
    items = []
    while (item := order.lowest()) is not None:
        order.forget(item)
        items.append(item)
    return items


def test_lru_lets_the_least_recently_touched_leave_first_whatever_it_costs():
    order = EvictionOrder("lru", Clock())
    for item in "abca":
        order.touch(item)
    for item, cost_s in zip("abc", (9.0, 1.0, 5.0), strict=True):
        order.offer(item, cost_s, 1)
    assert drain(order) == ["b", "c", "a"]


def test_cost_lets_the_cheapest_byte_leave_first():
    order = EvictionOrder("cost", Clock())
    for item, cost_s, num_bytes in [("a", 4.0, 100), ("b", 4.0, 400), ("c", 1.0, 50)]:
        order.touch(item)
        order.offer(item, cost_s, num_bytes)
    assert drain(order) == ["b", "c", "a"]


def test_a_burst_of_uses_counts_about_once_and_uses_apart_count_each():
    clock = Clock()
    order = EvictionOrder("cost", clock, RULES)
    for _ in range(9):
        order.touch("burst")
    for _ in range(3):
        order.touch("apart")
        clock.now += 133.0
    for item in ("burst", "apart"):
        order.touch(item)
        order.offer(item, 1.0, 1)
    clock.now += 133.0
    assert drain(order) == ["burst", "apart"]


def test_what_was_just_used_stays_before_what_is_popular_and_leaves_after_it_soon():
    clock = Clock()
    order = EvictionOrder("cost", clock, RULES)
    for _ in range(3):
        order.touch("popular")
        clock.now += 133.0
    order.touch("new")
    for item in ("popular", "new"):
        order.offer(item, 1.0, 1)
    assert order.lowest() == "popular"
    clock.now += 133.0
    assert order.lowest() == "new"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("later_s", [0.0, 1.0, 7.0, 133.0])
def test_order_is_that_of_expected_uses_at_any_later_time(seed, later_s):
    rng = random.Random(seed)
    clock = Clock()
    order = EvictionOrder("cost", clock, RULES)
    num_uses, last_s = {}, {}
    for _ in range(333):
        clock.now += rng.random()
        item = rng.randrange(30)
        order.touch(item)
        if item in last_s:
            gap_s = clock.now - last_s[item]
            num_uses[item] = num_uses[item] * 0.5 ** (gap_s / 200.0) + 1 - 0.5 ** (gap_s / 5.0)
        else:
            num_uses[item] = 1.0
        last_s[item] = clock.now
    prices = {item: (rng.uniform(0.1, 9.0), rng.randrange(1, 9)) for item in last_s}
    for item, price in prices.items():
        order.offer(item, *price)
    for _ in range(3):
        order.lowest()
        clock.now += later_s / 3

    def worth(item):
        cost_s, num_bytes = prices[item]
        age_s = clock.now - last_s[item]
        soon = 0.5 ** (age_s / 5.0) / 5.0
        popular = num_uses[item] * 0.5 ** (age_s / 200.0) / 200.0
        return cost_s / num_bytes * max(soon, popular)

    assert drain(order) == sorted(prices, key=worth)


@pytest.mark.parametrize("policy", ["cost", "lru"])
def test_only_what_is_offered_leaves_and_a_new_offer_replaces_the_old_one(policy):
    order = EvictionOrder(policy, Clock())
    for item in "abc":
        order.touch(item)
        order.offer(item, 1.0, 1)
    order.withdraw("a")
    order.withdraw("never offered")
    order.offer("b", 9.0, 1)
    order.touch("b")
    order.offer("b", 9.0, 1)
    assert len(order) == 2
    assert "a" not in order
    assert drain(order) == ["c", "b"]
    assert len(order) == 0


def test_uses_are_remembered_after_an_item_has_left():
    clock = Clock()
    order = EvictionOrder("cost", clock, RULES)
    for _ in range(3):
        order.touch("back")
        clock.now += 133.0
    order.offer("back", 1.0, 1)
    order.forget("back")
    assert order.lowest() is None
    for item in ("back", "stranger"):
        order.touch(item)
        order.offer(item, 1.0, 1)
    clock.now += 133.0
    assert drain(order) == ["stranger", "back"]


def test_only_a_bounded_number_of_items_is_remembered_and_a_forgotten_one_is_a_stranger():
    order = EvictionOrder("cost", Clock(), EvictionRules(max_remembered=3))
    for item in ["old", "old", "old", 1, 2, 3]:
        order.touch(item)
    assert len(order._uses) == 3
    order.touch("old")
    order.offer("old", 1.0, 1)
    order.touch(3)
    order.offer(3, 1.0, 1)
    assert drain(order) == ["old", 3]


def test_an_item_nothing_is_known_of_counts_as_used_when_it_is_offered():
    order = EvictionOrder("lru", Clock())
    order.touch("a")
    order.offer("unknown", 1.0, 1)
    order.offer("a", 1.0, 1)
    assert drain(order) == ["a", "unknown"]


def test_what_costs_nothing_leaves_before_everything_else():
    order = EvictionOrder("cost", Clock())
    for _ in range(9):
        order.touch("free")
    order.offer("cheap", 1e-9, 10**12)
    order.offer("free", 0.0, 1)
    assert drain(order) == ["free", "cheap"]


@pytest.mark.parametrize("policy", ["cost", "lru"])
def test_withdrawn_offers_do_not_pile_up(policy):
    order = EvictionOrder(policy, Clock())
    order.offer("stays", 1.0, 1)
    for _ in range(1000):
        order.touch("a")
        order.offer("a", 1.0, 1)
        order.withdraw("a")
    assert len(order._bursts) + len(order._popular) < 100
    assert drain(order) == ["stays"]


def test_costs_follow_what_is_measured():
    costs = CostModel()
    for _ in range(60):
        costs.saw_read(10**8, 1.0)
        costs.saw_copy(10**8, 0.1)
        costs.saw_prefill(100, 2.0)
        costs.saw_step(0.5)
    lost_s = 0.5 * LOAD_STEPS
    assert costs.adapter_s(10**7, is_in_host=True) == pytest.approx(lost_s + 0.01, rel=1e-3)
    assert costs.adapter_s(10**7, is_in_host=False) == pytest.approx(lost_s + 0.11, rel=1e-3)
    assert costs.prefix_page_s(16, 0) == pytest.approx(0.32, rel=0.01)


def test_costs_are_plausible_before_anything_is_measured_and_follow_a_change():
    costs = CostModel()
    assert 0 < costs.adapter_s(10**6, is_in_host=True) < costs.adapter_s(10**6, is_in_host=False)
    assert 0 < costs.prefix_page_s(16, 0) < costs.prefix_page_s(16, 10_000)
    for seconds in (1.0, 5.0):
        for _ in range(60):
            costs.saw_copy(10**8, seconds)
            costs.saw_step(1e-6)
        assert costs.adapter_s(10**8, is_in_host=True) == pytest.approx(seconds, rel=0.02)


def test_a_small_slow_observation_weighs_little():
    costs = CostModel()
    costs.saw_copy(10**9, 1.0)
    before = costs.adapter_s(10**9, is_in_host=True)
    costs.saw_copy(1, 0.001)
    assert costs.adapter_s(10**9, is_in_host=True) == pytest.approx(before, rel=0.01)
