"""Placement: forecast, copies by largest remainder, greedy, local search, bursts, hysteresis."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest

from loraswarm.cluster.placement import LoadForecast, PlacementRules, Planner, Prefetch, Rates
from loraswarm.cluster.placement.burst import BurstTolerance
from loraswarm.cluster.placement.copies import apportion
from loraswarm.cluster.placement.demand import Demand
from loraswarm.cluster.placement.forecast import ForecastRules
from loraswarm.cluster.placement.greedy import Held, Placement, place
from loraswarm.cluster.placement.improve import improve
from routing_cases import LIMITS, SIZES, view_of

ROOM = 1000.0


def demand_of(work, num_bytes=1.0, churn=0.0, rows=0.0, present=0.0):
    """Loads given outright; by default every adapter takes one byte and moves for nothing."""
    work = np.array(work, dtype=float)

    def column(value):
        return np.broadcast_to(np.asarray(value, dtype=float), work.shape).copy()

    return Demand(
        num_bytes=column(num_bytes),
        work=work,
        rows=column(rows),
        present=column(present),
        churn=column(churn),
    )


def counts(*values):
    return np.array(values, dtype=np.int64)


def check(placement: Placement, demand: Demand, rooms):
    """Loads and rooms are the sums of what is there, and nobody has more than there is room for."""
    for replica, on in enumerate(placement.on):
        assert placement.loads[replica] == pytest.approx(sum(on.values()))
        taken = sum(demand.num_bytes[adapter] for adapter in on)
        assert placement.room_bytes[replica] == pytest.approx(rooms[replica] - taken)
        assert placement.room_bytes[replica] >= 0
    places = {
        (adapter, replica)
        for adapter, replicas in placement.replicas_of.items()
        for replica in replicas
    }
    assert places == {(a, replica) for replica, on in enumerate(placement.on) for a in on}
    assert len(places) == sum(map(len, placement.replicas_of.values())), "no copy twice"


def test_a_forecast_follows_a_burst_at_once_and_forgets_it_slowly():
    rules = ForecastRules(fast_half_life_s=10, slow_half_life_s=100, least_rate=0.01)
    forecast = LoadForecast(rules)
    forecast.saw(["a"], 600, 200)
    forecast.saw(["a", "b"], 400, 0)
    forecast.advance(10.0)
    names, prompts, outputs = forecast.rates()
    assert names == ["a", "b"]
    assert prompts.tolist() == pytest.approx([50.0, 20.0]), "half the way to 100 and to 40"
    assert outputs.tolist() == pytest.approx([10.0, 0.0])
    forecast.advance(110.0)
    slow = 100 * (1 - 2**-0.1) * 0.5
    assert forecast.rates().prompt_rates[0] == pytest.approx(slow), "the slow average by now"
    forecast.advance(5000.0)
    assert forecast.rates().names == []


def test_a_forecast_keeps_rows_apart_while_adapters_come_and_go():
    forecast = LoadForecast(ForecastRules(least_rate=1.0))
    forecast.saw(["a"], 1e6, 0)
    forecast.saw(["b"], 100, 0)
    forecast.advance(10.0)
    forecast.saw(["c"], 1e5, 1e4)
    forecast.advance(100.0)
    forecast.advance(300.0)
    names, prompts, outputs = forecast.rates()
    assert names == ["a", "c"]
    assert prompts[0] > prompts[1] > outputs[1] > outputs[0] == 0
    forecast.forget("a")
    forecast.advance(301.0)
    assert forecast.rates().names == ["c"]


def test_copies_are_in_proportion_and_the_largest_remainders_get_the_rest():
    assert apportion(np.array([5.0, 3.0, 2.0]), 10, 10).tolist() == [5, 3, 2]
    # Quotas 4.2, 2.4, 1.4: the last seat goes to the first of the two largest remainders.
    assert apportion(np.array([21.0, 12.0, 7.0]), 8, 10).tolist() == [4, 3, 1]


def test_copies_have_bounds_and_the_others_share_what_those_leave():
    assert apportion(np.array([98.0, 1.0, 1.0, 0.0]), 6, 10).tolist() == [4, 1, 1, 0]
    assert apportion(np.array([90.0, 8.0, 2.0]), 12, 4).tolist() == [4, 4, 4]
    assert apportion(np.array([1.0, 1.0, 1.0]), 2, 4).tolist() == [1, 1, 1], "each has one"
    assert apportion(np.zeros(3), 6, 4).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_copies_hold_their_bounds_and_add_up(seed):
    rng = np.random.default_rng(seed)
    loads = rng.pareto(1.0, 200) * rng.integers(0, 2, 200)
    num_active, most = int((loads > 0).sum()), int(rng.integers(2, 40))
    copies = apportion(loads, num_active + most - 1, most)
    assert copies.sum() == num_active + most - 1
    assert (copies[loads == 0] == 0).all()
    assert copies[loads > 0].min() >= 1
    assert copies.max() <= most
    order = np.argsort(loads, kind="stable")
    assert (np.diff(copies[order]) >= 0).all(), "more load, not fewer copies"


def test_splitting_an_adapter_costs_reading_its_tiles_more_often():
    demand = demand_of([0.6, 0.6], rows=[4.0, 0.1], present=0.05)
    whole, halves = demand.copy_loads(np.ones(2)), demand.copy_loads(np.full(2, 2.0))
    assert (2 * halves > whole).all()
    extra = 2 * halves - whole
    assert extra[0] > 5 * extra[1], "one that is in few steps is in as many, split or not"
    assert extra[0] == pytest.approx(0.05 * (2 * (1 - np.exp(-2)) - (1 - np.exp(-4))))


def test_demand_is_work_by_the_cost_model():
    rates = Rates(["small", "large"], np.array([0.0, 0.0]), np.array([10.0, 10.0]))
    view = view_of(1)
    demand = Demand.of(rates, view, LIMITS, horizon_s=10.0)
    extra = demand.work[1] - demand.work[0]
    more_bytes = SIZES["large"] - SIZES["small"]
    assert extra == pytest.approx(10 * view.costs.step.lora_product_s * more_bytes)
    bring_s = view.costs.load_s(SIZES["large"]) + view.costs.copy_s(SIZES["large"])
    assert demand.churn[1] == pytest.approx(bring_s / 10.0)
    doubled = Demand.of(
        Rates(rates.names, rates.prompt_rates + 5, 2 * rates.output_rates), view, LIMITS, 10.0
    )
    assert (doubled.work > 2 * demand.work).all()


def test_greedy_places_the_largest_first_and_copies_apart():
    demand = demand_of([8.0, 3.0, 3.0, 2.0])
    placement = place(demand, counts(2, 1, 1, 1), Held(), [ROOM] * 3)
    check(placement, demand, [ROOM] * 3)
    assert sorted(placement.loads) == pytest.approx([4.0, 6.0, 6.0])
    assert len(set(placement.replicas_of[0])) == 2


def test_greedy_leaves_what_is_held_while_loads_are_within_the_limit():
    demand = demand_of([4.0, 4.0, 1.0, 1.0])
    ones = counts(1, 1, 1, 1)
    planned = {0: [0], 1: [0], 2: [1], 3: [1]}
    assert place(demand, ones, Held(planned, {}, limit=8.0), [ROOM] * 2).loads == [8.0, 2.0]
    assert place(demand, ones, Held({}, planned, limit=8.0), [ROOM] * 2).loads == [8.0, 2.0]
    assert sorted(place(demand, ones, Held(planned, {}, limit=5.0), [ROOM] * 2).loads) == [5, 5]


def test_greedy_prefers_where_it_was_planned_then_where_it_is_then_what_is_free():
    demand = demand_of([1.0], churn=0.5)
    one = counts(1)
    held = Held({0: [2]}, {0: [1]}, limit=9.0)
    assert place(demand, one, held, [ROOM] * 3).replicas_of == {0: [2]}
    assert place(demand, one, held, [ROOM, ROOM, 0.5]).replicas_of == {0: [1]}
    assert place(demand, one, held, [ROOM, 0.5, 0.5]).replicas_of == {0: [0]}


def test_greedy_pays_churn_only_for_a_larger_relief():
    def second(churn):
        demand = demand_of([2.0, 1.0], churn=churn)
        held = Held({}, {0: [0], 1: [0]}, limit=0.0)
        return place(demand, counts(1, 1), held, [ROOM] * 2).replicas_of[1]

    assert second(1.9) == [1]
    assert second(2.1) == [0]


def test_what_has_no_room_is_counted_and_never_placed():
    demand = demand_of([5.0, 4.0, 3.0], num_bytes=[6.0, 6.0, 4.0])
    placement = place(demand, counts(1, 1, 1), Held(), [10.0, 5.0])
    check(placement, demand, [10.0, 5.0])
    assert placement.num_unplaced == 1
    assert placement.replicas_of == {0: [0], 2: [1]}


def search(placement, demand, tolerance=0.0):
    ticks = itertools.count()
    return improve(placement, demand, tolerance, 200, lambda: next(ticks))


def placed(demand, places, rooms):
    """Each copy of an adapter with an equal part of its work."""
    placement = Placement.empty(rooms)
    for adapter, replicas in places.items():
        for replica in replicas:
            load = float(demand.work[adapter]) / len(replicas)
            placement.put(adapter, replica, load, float(demand.num_bytes[adapter]))
    return placement


def test_local_search_moves_a_copy():
    demand = demand_of([3.0, 2.0, 1.0])
    placement = placed(demand, {0: [0], 1: [0], 2: [0]}, [ROOM] * 2)
    assert search(placement, demand) > 0
    check(placement, demand, [ROOM] * 2)
    assert sorted(placement.loads) == [3.0, 3.0]


def test_local_search_shifts_a_share_where_both_have_a_copy():
    demand = demand_of([4.0, 3.0], churn=100.0)
    placement = placed(demand, {0: [0, 1], 1: [0]}, [ROOM] * 2)
    assert search(placement, demand) == 1
    assert placement.loads == pytest.approx([3.5, 3.5])
    assert placement.on[0][0] == pytest.approx(0.5)


def test_local_search_swaps_where_a_move_would_not_help_or_has_no_room():
    demand = demand_of([6.0, 5.0, 4.0, 3.0], num_bytes=5.0)
    placement = placed(demand, {0: [0], 1: [0], 2: [1], 3: [1]}, [10.0, 10.0])
    assert search(placement, demand) == 1
    check(placement, demand, [10.0, 10.0])
    assert sorted(placement.loads) == [9.0, 9.0]


def test_local_search_moves_nothing_where_there_is_no_room():
    demand = demand_of([3.0, 2.0, 1.0], num_bytes=5.0)
    placement = placed(demand, {0: [0], 1: [0], 2: [0]}, [15.0, 4.0])
    assert search(placement, demand) == 0
    check(placement, demand, [15.0, 4.0])


@pytest.mark.parametrize(("churn", "tolerance"), [(2.1, 0.0), (0.0, 0.34)])
def test_local_search_leaves_what_is_not_worth_it(churn, tolerance):
    demand = demand_of([2.0, 2.0, 2.0, 2.0], churn=churn)
    places = {0: [0], 1: [0], 2: [0], 3: [1]}
    if tolerance:
        demand = demand_of([2.0, 2.0, 2.0, 3.0])
    placement = placed(demand, places, [ROOM] * 2)
    assert search(placement, demand, tolerance) == 0


def test_local_search_ends_when_its_time_is_out():
    demand = demand_of(np.arange(1, 50))
    placement = placed(demand, {adapter: [0] for adapter in range(49)}, [ROOM] * 4)
    ticks = itertools.count()
    assert improve(placement, demand, 0.0, 3, lambda: next(ticks)) == 3


@pytest.mark.parametrize("seed", range(6))
def test_greedy_and_search_stay_near_the_mean_and_within_room(seed):
    rng = np.random.default_rng(seed)
    demand = demand_of(rng.pareto(1.1, 300) + 0.01, num_bytes=rng.integers(1, 5, 300))
    num_replicas = int(rng.integers(2, 17))
    copies = apportion(demand.work, 300 + num_replicas - 1, num_replicas)
    rooms = [float(2.0 * (demand.num_bytes * copies).sum() / num_replicas)] * num_replicas
    random = Random(seed)
    resident = {a: [random.randrange(num_replicas)] for a in range(0, 300, 3)}
    placement = place(demand, copies, Held({}, resident), rooms)
    search(placement, demand)
    check(placement, demand, rooms)
    assert placement.num_unplaced == 0
    assert sum(placement.loads) == pytest.approx(demand.work.sum())
    assert max(placement.loads) <= 1.05 * demand.work.sum() / num_replicas


def test_burst_tolerance_is_free_memory_over_share():
    demand = demand_of([3.0, 1.0])
    placement = placed(demand, {0: [0, 1], 1: [1]}, [ROOM] * 2)
    tolerance = BurstTolerance(placement, demand, [30.0, 15.0])
    assert tolerance.of(0) == pytest.approx(45.0 / 0.75)
    assert tolerance.of(1) == pytest.approx(15.0 / 0.25)
    assert tolerance.least() == pytest.approx(60.0)


def test_spare_copies_go_to_the_adapter_that_a_burst_would_hurt_first():
    demand = demand_of([8.0, 1.0, 1.0])
    placement = placed(demand, {0: [0], 1: [1], 2: [2]}, [ROOM] * 3)
    tolerance = BurstTolerance(placement, demand, [100.0, 90.0, 100.0])
    before = tolerance.least()
    assert tolerance.raise_least(1, 1.0, lambda: 0.0) == 1
    assert placement.replicas_of == {0: [0, 2], 1: [1], 2: [2]}
    assert placement.on[2][0] == 0.0
    assert tolerance.least() > before
    assert tolerance.raise_least(9, 1.0, lambda: 0.0) == 1, "it is everywhere then"
    assert placement.replicas_of[0] == [0, 2, 1]
    placement = placed(demand, {0: [0], 1: [1], 2: [2]}, [ROOM] * 3)
    held = BurstTolerance(placement, demand, [100.0, 90.0, 100.0], Held({}, {0: [1]}))
    held.raise_least(1, 1.0, lambda: 0.0)
    assert placement.replicas_of[0] == [0, 1], "where it is held already"


def test_no_spare_copy_lowers_the_least_tolerance_or_takes_room_that_is_not_there():
    demand = demand_of([5.0, 5.0], num_bytes=40.0)
    placement = placed(demand, {0: [0], 1: [1]}, [ROOM] * 2)
    even = BurstTolerance(placement, demand, [60.0, 60.0])
    assert even.raise_least(5, 1.0, lambda: 0.0) == 0, "1 would lose 40 of its 60"
    full = placed(demand_of([8.0, 1.0]), {0: [0], 1: [1]}, [ROOM, 1.5])
    scarce = BurstTolerance(full, demand_of([8.0, 1.0]), [60.0, 60.0])
    assert scarce.raise_least(5, 1.0, lambda: 0.0) == 0


def rates_of(**outputs):
    """Tokens a second of answers by adapter."""
    values = np.array(list(outputs.values()), dtype=float)
    return Rates(list(outputs), np.zeros(len(values)), values)


def planner_of(**rules):
    return Planner(PlacementRules(**rules), clock=lambda: 0.0)


def test_a_plan_prefetches_what_is_missing_and_nothing_else():
    view = view_of(2)
    view.set_tier("r0", "small", "host")
    rates = rates_of(small=10, other=10)
    plan = planner_of(max_spare=0.0).plan(view, rates)
    places = plan.places()
    assert "r0" in places["small"]
    told = {(each.replica_id, each.adapter) for each in plan.prefetches}
    wanted = {(replica, name) for name, ids in places.items() for replica in ids}
    assert told == wanted - {("r0", "small")}
    assert told
    for replica, name in wanted:
        view.set_tier(replica, name, "device")
    assert planner_of(max_spare=0.0).plan(view, rates).prefetches == ()


def test_a_plan_uses_only_replicas_that_accept_and_says_so_little_at_once():
    view = view_of(3, {f"a{i}": 1000 for i in range(40)})
    view.replicas["r1"].accepts = False
    rates = rates_of(**{f"a{i}": i + 1 for i in range(40)})
    plan = planner_of(max_prefetches=3).plan(view, rates)
    assert set(plan.loads) == {"r0", "r2"}
    assert {each.replica_id for each in plan.prefetches} == {"r0", "r2"}
    assert len(plan.prefetches) == 6
    assert plan.prefetches[0].adapter == "a38", "the most loaded copy first: a39 has two"
    for replica in view.replicas.values():
        replica.accepts = False
    assert planner_of().plan(view, rates).prefetches == ()


def test_the_same_rates_give_the_same_plan_again():
    view = view_of(4, {f"a{i}": 1000 for i in range(30)})
    rates = rates_of(**{f"a{i}": 100 / (i + 1) for i in range(30)})
    planner = planner_of()
    first = planner.plan(view, rates)
    second = planner.plan(view, rates)
    assert {k: sorted(v) for k, v in second.places().items()} == {
        k: sorted(v) for k, v in first.places().items()
    }
    fresh = planner_of().plan(view, rates_of(**{f"a{29 - i}": 100 / (30 - i) for i in range(30)}))
    assert fresh.places() != first.places(), "another planner would have planned another way"


def test_a_plan_follows_adapters_through_other_rows_and_replicas():
    view = view_of(4, {f"a{i}": 1000 for i in range(20)})
    rates = {f"a{i}": 100.0 / (i + 1) for i in range(20)}
    planner = planner_of(max_spare=0.0)
    first = planner.plan(view, rates_of(**rates)).places()
    del rates["a3"]
    second = planner.plan(view, rates_of(**dict(reversed(rates.items())))).places()
    num_kept = sum(set(second[name]) == set(first[name]) for name in rates)
    assert num_kept >= 15
    assert "a3" not in second
    view.remove_replica("r0")
    third = planner.plan(view, rates_of(**rates)).places()
    assert not any("r0" in ids for ids in third.values())


def test_copies_are_taken_back_only_after_some_plans_that_want_fewer():
    view = view_of(4, {"hot": 1000, "cold": 1000})
    planner = planner_of(patience=3, max_spare=0.0)
    num_hot = [
        len(planner.plan(view, rates_of(hot=hot, cold=10)).places()["hot"])
        for hot in (1000, 10, 10, 10, 10)
    ]
    assert num_hot[:3] == [4, 4, 4]
    assert num_hot[3] == num_hot[4] < 4


def test_a_prefetch_names_replica_and_adapter():
    view = view_of(1, {"a": 1000})
    plan = planner_of().plan(view, rates_of(a=1))
    assert plan.prefetches == (Prefetch("r0", "a"),)
