"""Migration beside what an engine does ahead of its answers or to its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine_factory import make_request, prompt_of, run_tokens, tokens_of
from frozen_cases import assert_nothing_left, finish, take
from loraswarm.core.request import SamplingParams
from merging_cases import merge, merging_engine, save_weak_swarm
from test_look_ahead_engine import look_ahead_engine

LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
DRAWN = replace(LONG, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_weak_swarm(path, 2)
    return path


def requests(params) -> list:
    names = ("a000", "a001", None)
    return [make_request(f"r{i}", name, prompt_of(i, 19), params) for i, name in enumerate(names)]


@pytest.mark.parametrize("params", [LONG, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_step_ahead_is_waited_for_and_its_tokens_are_in_the_snapshot(swarm, mode, params):
    source, target = (look_ahead_engine(swarm, mode) for _ in range(2))
    expected = run_tokens(look_ahead_engine(swarm, "off"), requests(params))
    run_tokens(source, requests(params))  # so that none waits for its adapter
    found = {name: [] for name in expected}
    for request in requests(params):
        source.add(request)
    num_landed = 0
    while len(found["r0"]) < 9:
        for event in source.step():
            found[event.request_id].append(event)
    for name in ("r0", "r2"):
        snapshot, landed = source.freeze(name, with_kv=True)
        num_landed += len(landed)
        for event in landed:
            found[event.request_id].append(event)
        assert snapshot.output_token_ids == tuple(tokens_of(found[name]))
        source.check()
        before = source._look_ahead.num_ahead
        for _ in range(4):
            for event in source.step():
                found[event.request_id].append(event)
        if name == "r0":
            target.adopt(snapshot)
            assert source.release(name)
        else:
            assert source.thaw(name)
        source.check()
        assert source._look_ahead.num_ahead > before  # also beside a frozen one
    assert num_landed == 5
    for engine in (source, target):
        for name, events in finish(engine).items():
            found[name] += events
        assert_nothing_left(engine)
    assert {name: tokens_of(events) for name, events in found.items()} == expected


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_request_that_ends_with_the_step_ahead_cannot_be_frozen_any_more(swarm, mode):
    engine = look_ahead_engine(swarm, mode)
    (request, *_) = requests(replace(LONG, max_tokens=6))
    engine.add(request)
    tokens = []
    while len(tokens) < 5:
        tokens += tokens_of(engine.step())
    assert engine._look_ahead.step is not None
    snapshot, (event,) = engine.freeze("r0", with_kv=True)
    assert snapshot is None
    assert event.finish_reason == "length"
    assert_nothing_left(engine)


@pytest.mark.parametrize("where", ["source", "target", "both"])
def test_merged_weights_on_either_side_give_the_same_tokens(swarm, where):
    source, target = (merging_engine(swarm) for _ in range(2))
    expected = run_tokens(source, requests(LONG))
    if where != "target":
        merge(source, "a000")
    if where != "source":
        merge(target, "a001")
    tokens = {name: [] for name in expected}
    for request in requests(LONG):
        source.add(request)
    while len(tokens["r2"]) < 12:
        for event in source.step():
            tokens[event.request_id] += event.token_ids
    for name in expected:
        target.adopt(take(source, name, with_kv=name != "r1"))
        assert source.release(name)
    for name, events in finish(target).items():
        tokens[name] += tokens_of(events)
    assert tokens == expected
    assert not source.has_work
