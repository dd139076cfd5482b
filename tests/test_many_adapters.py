"""More adapters than any tier holds, under Zipf traffic: a slice of tests/long/zipf_swarm.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "long"))

from zipf_swarm import Right, Swarm, Traffic, held_by_process, unload_all

NUM_ADAPTERS = 120
NUM_REQUESTS = 300
NUM_ON_DEVICE = 6
NUM_IN_HOST = 25


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    swarm = Swarm(tmp_path_factory.mktemp("zipf"), NUM_ADAPTERS)
    yield swarm
    swarm.undisturbed.close()


@pytest.mark.parametrize(("eviction", "loader"), [("cost", "process"), ("lru", "thread")])
def test_every_answer_is_right_through_every_tier_and_nothing_is_left(swarm, eviction, loader):
    before = held_by_process()
    engine = swarm.small_engine(NUM_ON_DEVICE, NUM_IN_HOST, eviction, loader)
    traffic = Traffic(swarm, engine, seed=7)
    traffic.run(NUM_REQUESTS, check_every=1)
    assert traffic.wrong == []
    outcomes = traffic.outcomes
    assert outcomes.total() == NUM_REQUESTS
    assert outcomes["right"] + outcomes["tie"] + outcomes["abort"] == NUM_REQUESTS
    assert outcomes["tie"] <= 2
    assert outcomes["abort"] > 0
    stats = engine.stats()
    assert min(stats.total_device_hits, stats.total_host_hits, stats.total_misses) > 10
    assert min(stats.total_device_evictions, stats.total_host_evictions) > 10
    assert stats.total_prefix_hit_tokens > 0
    assert stats.total_load_failures == 0
    unload_all(engine, swarm.names)
    engine.close()
    del engine, traffic
    assert held_by_process() <= before


def test_the_swarm_tells_a_wrong_answer_from_a_right_one_and_adapters_apart(swarm):
    prompt = tuple(range(3, 40))
    answers = [swarm.right((((name, 1.0),), prompt)) for name in swarm.names[:40]]
    assert len({tuple(answer.tokens) for answer in answers}) > 35
    one, other = Right([5, 6], [1.0, 1.0]), Right([5, 6], [1.0, 0.0])
    assert [one.is_met_by(tokens) for tokens in ([5, 6], [5, 7], [5], [5, 6, 6])] == [
        "right",
        "wrong",
        "wrong",
        "wrong",
    ]
    assert other.is_met_by([5, 7]) == "tie"
