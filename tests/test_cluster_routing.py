"""Routing policies: where each sends a request, worked by hand, and what none may ever do."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict, replace
from random import Random

import pytest

from loraswarm.cluster.routing import NAMES, PrefixTokens, make_router
from loraswarm.cluster.routing.baselines import DloraDispatch
from loraswarm.cluster.routing.marginal import MarginalCost
from loraswarm.errors import ConfigError
from routing_cases import LIMITS, decoding, random_view, request, view_of


def contents(view):
    """All that a policy could have changed."""
    replicas = {name: asdict(copy.deepcopy(each)) for name, each in view.replicas.items()}
    return replicas, copy.deepcopy(view.holders), view.now_s


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(12))
def test_only_replicas_that_accept_are_chosen_and_the_view_is_left_alone(name, seed):
    rng = Random(seed)
    view = random_view(rng, rng.choice([1, 3, 7, 30]), 9, is_accepting=rng.choice([0.1, 0.7]))
    router = make_router(name, seed)
    before = contents(view)
    num_accepting = sum(each.accepts for each in view.replicas.values())
    prefix = PrefixTokens({rng.choice(list(view.replicas)): 16, "gone": 32})
    for index in range(20):
        adapters = rng.sample([f"a{i}" for i in range(12)], rng.randrange(3))
        chosen = router.route(request(f"new{index}", *adapters), view, prefix)
        assert chosen is None or view.replicas[chosen].accepts
        if name != "punica":
            assert (chosen is None) == (num_accepting == 0)
    assert contents(view) == before


@pytest.mark.parametrize("name", NAMES)
def test_nobody_is_chosen_where_nobody_accepts(name):
    view = view_of(2)
    router = make_router(name)
    assert router.route(request(), view) is not None
    for replica in view.replicas.values():
        replica.accepts = False
    assert router.route(request(), view) is None
    assert router.route(request(), view_of(0)) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_decides_the_same(name):
    def decisions():
        router = make_router(name, 5)
        view = random_view(Random(3), 40, 9)
        return [router.route(request(str(i), f"a{i % 9}"), view) for i in range(50)]

    assert decisions() == decisions()


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ConfigError, match="'nearest'; it must be one of round-robin"):
        make_router("nearest")


def test_round_robin_takes_turns_among_those_that_accept():
    view = view_of(4)
    view.replicas["r1"].accepts = False
    router = make_router("round-robin")
    assert [router.route(request(), view) for _ in range(5)] == ["r0", "r2", "r3", "r0", "r2"]


def test_least_loaded_counts_open_requests():
    view = view_of(3)
    decoding(view.replicas["r0"])
    decoding(view.replicas["r2"], prompt=999)
    assert make_router("least-loaded").route(request(), view) == "r1"
    decoding(view.replicas["r1"])
    decoding(view.replicas["r1"])
    assert make_router("least-loaded").route(request(), view) == "r0"


def test_punica_packs_the_fullest_that_fits_and_holds_what_fits_nowhere():
    view = view_of(3)
    router = make_router("punica")
    assert router.route(request(), view) == "r2", "ties go to the largest id"
    decoding(view.replicas["r0"])
    assert router.route(request(), view) == "r0"
    for _ in range(LIMITS.num_seats - 1):
        decoding(view.replicas["r0"])
    assert router.route(request(), view) == "r2", "no seat is left on r0"
    for name in ("r1", "r2"):
        decoding(view.replicas[name], prompt=90 * 16)
    assert router.route(request(prompt=8 * 16), view) == "r2"
    assert router.route(request(prompt=9 * 16), view) is None, "no pages are left"
    assert router.route(request("new", "large", prompt=8 * 16), view) is None, "nor for an adapter"


def test_dlora_counts_batches_and_trades_an_idle_copy_for_a_transfer():
    view = view_of(3, limits=replace(LIMITS, num_seats=64))
    dispatch = DloraDispatch()
    r0, r1 = view.replicas["r0"], view.replicas["r1"]
    for _ in range(17):
        decoding(r0, "small")
    for _ in range(15):
        decoding(r0, "large")
    assert dispatch.engine_cost(r0) == pytest.approx(1 * 0.6 + (1 + 15) // 16)
    decoding(r0)
    assert dispatch.engine_cost(r0) == pytest.approx(1.6), "the base is one more adapter"
    assert dispatch.route(request("new", "small"), view) == "r1", "nobody holds it: any may"
    view.set_tier("r0", "small", "device")
    assert dispatch.route(request("new", "small"), view) == "r0", "others have no idle copy"
    view.set_tier("r1", "other", "device")
    assert dispatch.route(request("new", "small"), view) == "r0", "r1's is the only copy"
    view.set_tier("r2", "other", "device")
    assert dispatch.route(request("new", "small"), view) == "r1"
    decoding(r1, "other")
    assert dispatch.route(request("new", "small"), view) == "r2"
    view.set_tier("r2", "large", "device")
    for each in [*r0.requests]:
        r0.remove(each)
    assert dispatch.route(request("new", "large"), view) == "r2", "a transfer takes time"


def test_marginal_prefers_residency_until_the_queue_is_longer_than_the_load():
    view = view_of(2)
    router = make_router("marginal")
    view.set_tier("r1", "large", "device")
    assert router.route(request("new", "large"), view) == "r1"
    assert router.route(request("new", "small"), view) == "r0", "nobody holds it: the first"
    for _ in range(LIMITS.num_seats):
        decoding(view.replicas["r1"], "large", expected=100)
    assert router.route(request("new", "large"), view) == "r0"


def test_marginal_prefers_device_to_host_to_store():
    view = view_of(3)
    view.set_tier("r1", "large", "host")
    view.set_tier("r2", "large", "device")
    router = make_router("marginal")
    assert router.route(request("new", "large"), view) == "r2"
    view.replicas["r2"].accepts = False
    assert router.route(request("new", "large"), view) == "r1"


def test_marginal_weighs_a_cached_prefix_against_a_load():
    view = view_of(2)
    view.set_tier("r1", "small", "device")
    router = make_router("marginal")
    long = request("new", "small", prompt=640)
    assert router.route(long, view) == "r1"
    assert router.route(long, view, PrefixTokens({"r0": 16})) == "r0"
    assert router.route(long, view, PrefixTokens({"r0": 1})) == "r1"


def test_marginal_joins_those_of_its_adapter():
    view = view_of(2)
    for name, adapter in (("r0", "large"), ("r1", "small")):
        for each in ("large", "small"):
            view.set_tier(name, each, "device")
        decoding(view.replicas[name], adapter)
    router = make_router("marginal")
    assert router.route(request("new", "large"), view) == "r0"
    assert router.route(request("new", "small"), view) == "r1"


@pytest.mark.parametrize("num_holders", [1, 3, 70, 150])
def test_marginal_finds_holders_among_many_replicas(num_holders):
    view = view_of(300)
    for index in range(num_holders):
        view.set_tier(f"r{299 - index}", "large", "device")
    router = MarginalCost(0)
    chosen = Counter(router.route(request(str(i), "large"), view) for i in range(60))
    assert all("large" in view.replicas[each].tiers for each in chosen)
    assert len(chosen) > 1 or num_holders == 1


class Backwards(set):
    """A set in another order, as there is in another process."""

    def __iter__(self):
        return iter(sorted(super().__iter__(), reverse=True))


def test_marginal_draws_the_same_holders_whatever_the_order_of_a_set_is():
    def decisions(kind):
        view = view_of(300)
        for index in range(40):
            view.set_tier(f"r{index}", "large", "device")
        view.holders["large"] = kind(view.holders["large"])
        router = MarginalCost(0)
        return [router.route(request(str(i), "large"), view) for i in range(20)]

    assert decisions(Backwards) == decisions(set)


def test_marginal_finds_the_only_replica_of_many_that_accepts():
    view = view_of(300)
    for name, replica in view.replicas.items():
        replica.accepts = name == "r222"
    router = MarginalCost(0)
    assert {router.route(request(str(i)), view) for i in range(9)} == {"r222"}


def test_marginal_finds_the_cached_prefix_among_many_replicas():
    view = view_of(300)
    prefix = PrefixTokens({"r150": 320, "r7": 16})
    assert MarginalCost(0).route(request(prompt=640), view, prefix) == "r150"


def test_marginal_spreads_what_nobody_holds_over_the_less_loaded():
    """Two thirds of the replicas have a request; drawing several finds an empty one mostly."""
    view = view_of(300)
    for index in range(200):
        decoding(view.replicas[f"r{index}"], expected=100)
    router = MarginalCost(0)
    chosen = [router.route(request(str(i), "large"), view) for i in range(100)]
    num_empty = sum(view.replicas[each].num_requests == 0 for each in chosen)
    assert num_empty >= 85
    assert len(set(chosen)) > 50
