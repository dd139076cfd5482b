"""More adapters than any tier holds, under Zipf traffic: a slice of tests/long/zipf_swarm.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "long"))

from zipf_swarm import ABORT_EVERY, Right, Swarm, Traffic, held_by_process, unload_all

NUM_ADAPTERS = 120
NUM_REQUESTS = 300


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    swarm = Swarm(tmp_path_factory.mktemp("zipf"), NUM_ADAPTERS)
    yield swarm
    swarm.undisturbed.close()


# The last: less room anywhere than the requests in flight want together.
@pytest.mark.parametrize(
    ("room", "eviction", "loader"),
    [((6, 25), "cost", "process"), ((6, 25), "lru", "thread"), ((2, 2), "cost", "thread")],
)
def test_every_answer_is_right_through_every_tier_and_nothing_is_left(
    swarm, room, eviction, loader
):
    before = held_by_process()
    engine = swarm.small_engine(*room, eviction, loader)
    traffic = Traffic(swarm, engine, seed=7)
    traffic.run(NUM_REQUESTS, check_every=1)
    assert traffic.wrong == []
    outcomes = traffic.outcomes
    assert outcomes.total() == NUM_REQUESTS
    assert outcomes["right"] + outcomes["tie"] + outcomes["abort"] == NUM_REQUESTS
    assert outcomes["tie"] <= 2
    assert outcomes["abort"] == NUM_REQUESTS // ABORT_EVERY
    stats = engine.stats()
    assert min(stats.total_device_hits, stats.total_misses) > 10
    assert stats.total_host_hits > 10 or room == (2, 2)
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
