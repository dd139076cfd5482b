"""The order in which things leave memory, by cost or by age, and the costs it goes by."""

from __future__ import annotations

import random

import pytest

from loraswarm.memory.costs import CostModel
from loraswarm.memory.eviction import EvictionOrder, EvictionRules


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


def test_cost_counts_uses_and_lets_old_ones_fade():
    clock = Clock()
    order = EvictionOrder("cost", clock, EvictionRules(half_life_s=10.0))
    for _ in range(4):
        order.touch("often")
    clock.now += 10.0
    order.touch("new")
    order.offer("often", 1.0, 1)
    order.offer("new", 1.0, 1)
    assert order.lowest() == "new", "4 uses of one half-life ago are worth 2 now"
    order.withdraw("new")
    clock.now += 15.0
    order.touch("new")
    order.offer("new", 1.0, 1)
    assert order.lowest() == "often", "4 uses fade to 0.7, fewer than 1.35"


@pytest.mark.parametrize("seed", range(3))
def test_order_is_that_of_decayed_worths_at_any_later_time(seed):
    rng = random.Random(seed)
    clock = Clock()
    half_life_s = 7.0
    order = EvictionOrder("cost", clock, EvictionRules(half_life_s=half_life_s))
    uses = {item: [] for item in range(30)}
    for _ in range(133):
        clock.now += rng.random()
        item = rng.randrange(30)
        order.touch(item)
        uses[item].append(clock.now)
    prices = {item: (rng.uniform(0.1, 9.0), rng.randrange(1, 9)) for item in uses if uses[item]}
    for item, price in prices.items():
        order.offer(item, *price)
    clock.now += 100.0

    def worth(item):
        cost_s, num_bytes = prices[item]
        decayed = sum(2.0 ** ((used - clock.now) / half_life_s) for used in uses[item])
        return cost_s / num_bytes * decayed

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
    order = EvictionOrder("cost", Clock())
    for _ in range(3):
        order.touch("back")
    order.offer("back", 1.0, 1)
    order.forget("back")
    assert order.lowest() is None
    for item in ("back", "stranger"):
        order.touch(item)
        order.offer(item, 1.0, 1)
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
    assert len(order._heap) < 100
    assert drain(order) == ["stays"]


def test_costs_follow_what_is_measured():
    costs = CostModel()
    for _ in range(60):
        costs.saw_read(10**8, 1.0)
        costs.saw_copy(10**8, 0.1)
        costs.saw_prefill(100, 2.0)
    assert costs.adapter_s(10**7, is_in_host=True) == pytest.approx(0.01, rel=0.01)
    assert costs.adapter_s(10**7, is_in_host=False) == pytest.approx(0.11, rel=0.01)
    assert costs.prefix_page_s(16, 0) == pytest.approx(0.32, rel=0.01)


def test_costs_are_plausible_before_anything_is_measured_and_follow_a_change():
    costs = CostModel()
    assert 0 < costs.adapter_s(10**6, is_in_host=True) < costs.adapter_s(10**6, is_in_host=False)
    assert 0 < costs.prefix_page_s(16, 0) < costs.prefix_page_s(16, 10_000)
    for seconds in (1.0, 5.0):
        for _ in range(60):
            costs.saw_copy(10**8, seconds)
        assert costs.adapter_s(10**8, is_in_host=True) == pytest.approx(seconds, rel=0.02)


def test_a_small_slow_observation_weighs_little():
    costs = CostModel()
    costs.saw_copy(10**9, 1.0)
    before = costs.adapter_s(10**9, is_in_host=True)
    costs.saw_copy(1, 0.001)
    assert costs.adapter_s(10**9, is_in_host=True) == pytest.approx(before, rel=0.01)
