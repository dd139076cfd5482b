"""Switches under traffic: whatever happens in the middle of one, answers and weights stay."""

from __future__ import annotations

import gc
import random
import shutil

import pytest
import torch

from engine_factory import GREEDY, make_engine, make_request, prompt_of, run, run_alone, run_tokens
from loraswarm.core.admin import RescanAdapters, UnloadAdapter
from loraswarm.core.request import SamplingParams
from merging_cases import (
    key_of,
    merge,
    merged_names,
    merging_engine,
    names,
    save_weak_swarm,
    weights_digest,
)
from served_logits import SCORED, served_logits
from tolerance import assert_close

NUM_ADAPTERS = 32
NUM_SWITCHES = 1000
SHORT = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
NUM_LINEARS = 8


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_weak_swarm(path, NUM_ADAPTERS)
    return path


@pytest.fixture(scope="module")
def answers(swarm):
    """What each adapter, and the base (None), says to the same prompt."""
    engine = make_engine(swarm)
    wanted = [None, *names(NUM_ADAPTERS)]
    requests = [make_request(str(name), name, prompt_of(1, 9), SHORT) for name in wanted]
    found = run_alone(engine, requests)
    assert len({tuple(tokens) for tokens in found.values()}) > NUM_ADAPTERS // 2
    return {name: found[str(name)] for name in wanted}


def carry_out(engine, command) -> None:
    """Administer, stepping until it is answered."""
    engine.begin_command(0, command)
    for _ in range(1000):
        engine.step(may_wait=False)
        engine.check()
        if engine.take_answers():
            return
        engine.wait(0.01)
    raise AssertionError(f"{command} was never answered")


def test_a_thousand_switches_under_traffic_leave_no_trace(swarm, answers):
    engine = merging_engine(swarm)
    merger, chance = engine.merger, random.Random(0)
    before = weights_digest(engine)
    keys = [key_of(engine, name) for name in names(NUM_ADAPTERS)]
    names_by_id: dict[str, str | None] = {}
    tokens: dict[str, list[int]] = {}
    partly = bytes_seen = 0
    while merger.num_switches < NUM_SWITCHES or engine.has_work:
        is_over = merger.num_switches >= NUM_SWITCHES
        while not is_over and len(names_by_id) < len(tokens) + 6:
            name = chance.choice([None, *names(NUM_ADAPTERS)])
            request_id = f"r{len(names_by_id)}"
            names_by_id[request_id] = name
            engine.add(make_request(request_id, name, prompt_of(1, 9), SHORT))
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
        for _ in range(chance.randrange(5)):
            merger.advance(0.0)
        partly += 0 < merger.num_merged < NUM_LINEARS
        bytes_seen = max(bytes_seen, merger.bytes)
        merger.set_target(None if is_over else chance.choice([None, *keys]))
        if len(tokens) % 50 == 0:
            engine.check()
    for request_id, found in tokens.items():
        assert found == answers[names_by_id[request_id]], names_by_id[request_id]
    assert len(tokens) > 100
    assert partly > 50
    assert bytes_seen > 0
    assert weights_digest(engine) == before
    assert (merger.bytes, merger.holds.keys, engine._runner.merged) == (0, (), ())
    assert all(place.linear.merged is None for place in merger._places)
    assert engine.stats().num_pinned_adapters == 0
    assert not engine._residency._users
    engine.check()


def test_copies_are_used_again(swarm):
    engine = merging_engine(swarm)
    merge(engine, "a000")
    full = engine.merger.bytes
    gc.collect()
    before = sum(type(one) is torch.Tensor for one in gc.get_objects())
    for turn in range(20):
        merge(engine, f"a00{1 + turn % 3}")
        assert engine.merger.bytes == full
    gc.collect()
    after = sum(type(one) is torch.Tensor for one in gc.get_objects())
    assert after <= before + 20  # tables of adapters that came into pages meanwhile
    engine.merger.set_target(None)
    assert engine.merger.bytes == 0


def test_logits_stay_within_the_table_while_weights_change_every_step(swarm):
    requests = [
        make_request(f"{name}", name, prompt_of(i, 40), SCORED)
        for i, name in enumerate(("a000", "a001", None, "a003", "a004"))
    ]
    plain = served_logits(make_engine(swarm), requests)
    engine = merging_engine(swarm, max_step_tokens=16, max_num_sequences=16)
    keys = [key_of(engine, name) for name in ("a000", "a001", "a005")]
    seen = set()

    def switch(step: int) -> None:
        engine.merger.set_target(keys[step // 5 % 3])
        engine.merger.advance(0.0)
        seen.add((engine.merger.num_merged, engine.merger.target))

    found = served_logits(engine, requests, switch)
    assert len(seen) > 6
    for name, (tokens, logits) in found.items():
        assert tokens == plain[name][0]
        assert_close(logits, plain[name][1], torch.float32)


def test_a_pool_full_of_nan_is_not_read_by_merging(swarm, answers):
    engine = merging_engine(swarm)
    engine._runner._buffer.pool.fill_(float("nan"))
    merge(engine, "a001")
    for name in ("a001", "a002", None):
        request = make_request("r", name, prompt_of(1, 9), SHORT)
        assert run_tokens(engine, [request])["r"] == answers[name]


def test_a_merged_adapter_is_never_evicted(swarm, answers):
    page_bytes = make_engine(swarm).info.page_bytes
    engine = merging_engine(swarm, pool_bytes=18 * page_bytes)
    merge(engine, "a000")
    key = engine.merger.target
    small = [f"a{index:03}" for index in (0, 1, 6, 7, 12, 13, 18, 19)]
    requests = [make_request(name, name, prompt_of(1, 9), SHORT) for name in small]
    found = run(engine, requests, lambda _: _pinned_if_merged(engine, key))
    assert engine.stats().total_device_evictions > 0
    for name, events in found.items():
        assert [t for event in events for t in event.token_ids] == answers[name]
    assert engine.merger.num_merged == NUM_LINEARS


def test_a_merged_adapter_gives_way_to_a_request_that_needs_its_pages_and_comes_back(
    swarm, answers, monkeypatch
):
    page_bytes = make_engine(swarm).info.page_bytes
    engine = merging_engine(swarm, pool_bytes=13 * page_bytes)
    merge(engine, "a000")
    key, given_way, give_way = engine.merger.target, [], engine.merger.give_way
    monkeypatch.setattr(
        engine.merger, "give_way", lambda: given_way.append(give_way()) or given_way[-1]
    )
    # K and V of 256 tokens take eight pages; the adapter takes six of thirteen.
    tokens = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    request = make_request("long", None, prompt_of(3, 56), tokens)
    expected = run_tokens(make_engine(swarm), [request])
    assert run_tokens(engine, [request]) == expected
    assert given_way == [True]
    assert (engine.merger.target, engine.merger.num_merged) == (key, 0)
    # What gave way comes back.
    for name in ("a001", "a000", None):
        for _ in range(3):
            request = make_request("r", name, prompt_of(1, 9), SHORT)
            assert run_tokens(engine, [request])["r"] == answers[name]
    assert (engine.merger.target, engine.merger.num_merged) == (key, NUM_LINEARS)


def _pinned_if_merged(engine, key) -> None:
    if engine.merger.num_merged:
        assert engine._memory.adapters.is_ready(key)
        assert not engine._memory.adapters._residents[key].may_leave


@pytest.mark.parametrize("num_merged", [0, 3, NUM_LINEARS])
def test_unloading_a_merged_adapter_restores_the_base_and_frees_its_pages(
    swarm, answers, num_merged
):
    engine = merging_engine(swarm)
    merge(engine, "a000", num_merged)
    key = engine.merger.target
    assert engine._memory.adapters.is_resident(key) == (num_merged > 0)
    carry_out(engine, UnloadAdapter("a000"))
    assert (engine.merger.num_merged, engine.merger.bytes, engine.merger.target) == (0, 0, None)
    assert not engine._memory.adapters.is_resident(key)
    assert not engine._residency._host.has(key)
    request = make_request("r", "a001", prompt_of(1, 9), SHORT)
    assert run_tokens(engine, [request])["r"] == answers["a001"]


def test_unloading_waits_for_a_request_of_the_merged_adapter(swarm, answers):
    engine = merging_engine(swarm)
    merge(engine, "a000", 5)
    engine.add(make_request("r", "a000", prompt_of(1, 9), SHORT))
    tokens = [t for event in engine.step() for t in event.token_ids]
    engine.begin_command(0, UnloadAdapter("a000"))
    while engine.has_work:
        tokens += [t for event in engine.step() for t in event.token_ids]
        engine.check()
    assert tokens == answers["a000"]
    assert engine.merger.num_merged == 0


@pytest.mark.parametrize("num_merged", [2, NUM_LINEARS])
def test_a_new_generation_is_merged_in_the_place_of_the_old(swarm, tmp_path, answers, num_merged):
    store = tmp_path / "store"
    shutil.copytree(swarm / "adapters" / "a000", store / "x")
    shutil.copytree(swarm / "adapters" / "a002", store / "calm")
    engine = merging_engine(swarm, adapters=(str(store),))
    merge(engine, "x", num_merged)
    old = engine.merger.target
    engine.merge_policy = lambda: engine.merger.holds.key_of("x")
    shutil.rmtree(store / "x")
    shutil.copytree(swarm / "adapters" / "a001", store / "x")
    carry_out(engine, RescanAdapters())
    requests = [make_request(name, name, prompt_of(1, 9), SHORT) for name in ("x", "calm")]
    for _ in range(20):
        found = run_tokens(engine, requests)
        assert found == {"x": answers["a001"], "calm": answers["a002"]}
        if engine.merger.num_merged == NUM_LINEARS:
            break
    assert engine.merger.num_merged == NUM_LINEARS
    assert engine.merger.target != old
    assert not engine._memory.adapters.is_resident(old)


def test_aborts_in_the_middle_of_a_switch_leave_nothing(swarm, answers):
    engine = merging_engine(swarm)
    merge(engine, "a000")
    for turn in range(6):
        for name in ("a000", "a001", None):
            engine.add(make_request(f"{name}{turn}", name, prompt_of(1, 9), LONG))
        engine.merger.set_target(key_of(engine, f"a00{turn % 3}"))
        for _ in range(3):
            engine.step()
            engine.merger.advance(0.0)
        engine.abort_all()
        engine.check()
        assert set(engine.merger.holds.keys) >= {
            place.key for place in engine.merger._places if place.key is not None
        }
        request = make_request("r", "a001", prompt_of(1, 9), SHORT)
        assert run_tokens(engine, [request])["r"] == answers["a001"]
    engine.merger.set_target(None)
    assert engine.stats().num_pinned_adapters == 0


def test_an_engine_closed_in_the_middle_of_a_switch_gives_back_the_copies(swarm):
    engine = merging_engine(swarm)
    before = weights_digest(engine)
    merge(engine, "a000", 4)
    engine.merger.set_target(key_of(engine, "a001"))
    while not engine.merger._making:
        engine._collect()
        engine.merger.advance(0.0)
    engine.close()
    assert engine.merger.bytes == 0
    assert engine._runner.merged == ()
    assert weights_digest(engine) == before


def test_an_engine_that_follows_one_closed_in_mid_switch_merges_anew(swarm, answers):
    before = set[str]()
    for name in ("a000", "a001"):
        engine = make_engine(swarm, merge=name)
        before.add(weights_digest(engine))
        assert merged_names(engine) == [name] * NUM_LINEARS
        requests = [make_request(str(one), one, prompt_of(1, 9), SHORT) for one in answers]
        assert run_tokens(engine, requests) == {str(one): answers[one] for one in answers}
        engine.add(make_request("open", "a001", prompt_of(1, 9), LONG))
        engine.merge_policy = lambda held=engine: key_of(held, "a002")
        engine.step()
        engine.close()
        before.add(weights_digest(engine))
    assert len(before) == 1


def test_cached_prefixes_are_shared_by_merged_and_unmerged_weights(swarm):
    prompt = prompt_of(2, 60)
    plain = make_engine(swarm)
    expected = {
        name: run_tokens(plain, [make_request("r", name, prompt, GREEDY)])["r"]
        for name in ("a000", "a001")
    }
    engine = merging_engine(swarm, prefix_caching=True)
    for target in ("a000", None, "a001", "a000"):
        engine.merger.set_target(None)
        if target is not None:
            merge(engine, target)
        for name, tokens in expected.items():
            assert run_tokens(engine, [make_request("r", name, prompt, GREEDY)])["r"] == tokens
    assert engine.stats().total_prefix_hit_tokens >= 3 * 48


@pytest.mark.parametrize("who", ["_largest_need", "num_taken_pages"])
def test_nothing_is_merged_in_pages_that_requests_or_pins_need(swarm, monkeypatch, who):
    engine = merging_engine(swarm)
    merger, key = engine.merger, key_of(engine, "a000")
    monkeypatch.setattr(merger.holds, who, lambda: engine.info.num_pages)
    merger.set_target(key)
    while merger.holds.problem is None:
        engine._collect()
        merger.advance(1.0)
        assert not merger.holds.keys
    assert "which are not to be had beside what runs" in merger.holds.problem
    assert (merger.num_merged, merger.holds.keys) == (0, ())
    monkeypatch.setattr(merger.holds, who, lambda: 0)
    merge(engine, "a000")
    assert (merger.num_merged, merger.holds.problem) == (NUM_LINEARS, None)


def test_an_adapter_that_cannot_be_copied_is_a_problem_and_not_merged(swarm, monkeypatch):
    engine = merging_engine(swarm)
    key = key_of(engine, "a000")

    def fail(*_):
        raise OSError("no more memory")

    monkeypatch.setattr(engine._runner._tiles, "copy", fail)
    engine.merger.set_target(key)
    for _ in range(200):
        engine._collect()
        engine.merger.advance(0.0)
        if engine.merger.holds.problem is not None:
            break
        engine.wait(0.01)
    assert "could not be copied" in engine.merger.holds.problem
    assert engine.merger.num_merged == 0
    engine.check()
