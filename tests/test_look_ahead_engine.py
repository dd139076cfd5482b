"""One step ahead in real engines, whose steps are computed as early and as late as they may: the
same tokens and ends as without."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from device_under_test import DEVICE
from engine_factory import GREEDY, make_engine, make_request, prompt_of, run, save_swarm, tokens_of
from loraswarm.core.admin import RescanAdapters
from loraswarm.core.request import SamplingParams
from loraswarm.engine.results import StepResults

NAMES = [f"a{i:03}" for i in range(6)]
STOPS = tuple(range(3, 15))


class LateRunner:
    """A model runner whose steps are computed when they are waited for."""

    def __init__(self, runner) -> None:
        self._runner = runner

    def launch(self, step, kv_cache, before=None):
        return LateResults(self._runner, self._runner.prepare(step, kv_cache), before)


class LateResults:
    def __init__(self, runner, prepared, before) -> None:
        self._runner, self._prepared, self._before = runner, prepared, before
        self._results = None

    def draw(self):
        if self._results is None:
            prepared = self._prepared
            if self._before is not None:
                prepared = replace(prepared, drawn_ids=self._before.draw())
            self._results = StepResults(self._runner.run(prepared), prepared.rows)
            self._before = None
        return self._results.draw()

    def wait(self):
        self.draw()
        return self._results.wait()


def poison_freed_pages(engine) -> None:
    """What reads a page that was given away finds NaN. (On a device the copier, whose stream is
    another, could be overtaken.)"""
    pool, pages = engine._memory.pool, engine._runner._buffer.pages
    free = pool.free

    def poisoning_free(owner):
        pages[list(pool.pages_of(owner))] = math.nan
        return free(owner)

    if DEVICE.type == "cpu":
        pool.free = poisoning_free


def look_ahead_engine(path, mode: str, **options):
    engine = make_engine(path, **options)
    engine._look_ahead.is_on = mode != "off"
    if mode == "late":
        engine._look_ahead._launcher = LateRunner(engine._runner)
    poison_freed_pages(engine)
    return engine


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, len(NAMES), ranks=(1, 4, 8))
    return path


KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 1.5, "seed": 7},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "seed": 8},
    {"temperature": 0.0, "presence_penalty": 0.8, "repetition_penalty": 1.3},
    {"temperature": 2.0, "min_tokens": 9, "seed": 9},
    {"temperature": 0.0, "logprobs": 2},
)


def traffic(seed: int) -> list[tuple[int, object]]:
    """Requests and the calls of `step` before which they come."""
    rng, now, found = Random(seed), 0, []
    shared = prompt_of(99, 40)
    for index in range(26):
        now += rng.choice([0, 0, 1, 3, 9] if seed < 2 else [0, 0, 0, 1])
        kind = KINDS[rng.randrange(len(KINDS))] if seed % 2 else KINDS[index % 2]
        params = SamplingParams(
            max_tokens=rng.randint(1, 45),
            ignore_eos=True,
            stop_token_ids=STOPS if seed < 2 else STOPS[:3],
            **kind,
        )
        prompt = prompt_of(index, rng.choice([1, 3, 7, 33]))
        if rng.random() < 0.4:
            prompt = shared[: rng.choice([16, 33, 40])] + prompt
        adapter = rng.choice([None, None, *NAMES])
        found.append((now, make_request(f"r{index}", adapter, prompt, params)))
    return found


def serve(engine, traffic, aborts=()) -> dict[str, list]:
    """Events by request; `aborts` are requests and after how many tokens they are aborted."""
    events, pending, now = {}, list(traffic), 0
    aborts = dict(aborts)
    while pending or engine.has_work:
        while pending and pending[0][0] <= now:
            _, request = pending.pop(0)
            events[request.request_id] = []
            engine.add(request)
        for event in engine.step():
            assert len(event.token_ids) <= 1
            assert not any(each.finish_reason for each in events[event.request_id])
            events[event.request_id].append(event)
        for name, num_tokens in list(aborts.items()):
            if num_tokens == len(tokens_of(events.get(name, []))):
                del aborts[name]
                ended = engine.abort(name)
                if ended is not None:
                    events[name].append(ended)
        engine.check()
        now += 1
    assert engine._look_ahead.step is None
    assert engine._memory.pool.num_owned("kv") == engine._memory.prefixes.num_used_pages == 0
    assert engine._memory.adapters.num_pinned == 0
    return events


def outcome(events) -> tuple:
    last = events[-1]
    return tokens_of(events), last.finish_reason, last.stop_token_id, last.error


@pytest.fixture(scope="module")
def expected(swarm):
    """What requests get without look-ahead, all at once and with room for all."""
    engine = look_ahead_engine(swarm, "off", prefix_caching=False)
    found = {}
    for seed in (0, 1, 2, 3):
        served = run(engine, [request for _, request in traffic(seed)])
        found[seed] = {name: outcome(events) for name, events in served.items()}
    assert engine._look_ahead.num_ahead == 0
    return found


@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_random_traffic_gets_the_same_tokens_and_ends_as_without(swarm, expected, mode, seed):
    num_pages = (200, 200, 12, 12)[seed]
    engine = look_ahead_engine(
        swarm,
        mode,
        prefix_caching=True,
        pool_bytes=num_pages * make_page_bytes(swarm),
        max_num_sequences=(16, 5, 16, 5)[seed],
        max_step_tokens=40,
    )
    rng = Random(seed)
    requests = traffic(seed)
    names = [request.request_id for _, request in requests]
    aborts = {name: rng.randint(0, 4) for name in rng.sample(names, 8)}
    events = serve(engine, requests, aborts)
    for name, (tokens, *end) in expected[seed].items():
        found, *found_end = outcome(events[name])
        if found_end[0] == "abort":
            assert name in aborts
            assert found == tokens[: len(found)]
        else:
            assert (found, found_end) == (tokens, end)
    reasons = {each[-1].finish_reason for each in events.values()}
    assert {"stop", "length", "abort"} <= reasons
    assert engine._look_ahead.num_ahead > 0
    if num_pages == 12:
        assert engine.stats().total_device_evictions > 0
    else:
        assert engine.stats().total_prefix_hit_tokens > 0
    engine.close()


def make_page_bytes(path) -> int:
    engine = make_engine(path)
    engine.close()
    return engine.info.page_bytes


@pytest.mark.parametrize("mode", ["early", "late"])
def test_a_lone_request_that_ends_under_a_step_leaves_nothing_under_way(swarm, mode):
    request = make_request("a", NAMES[2], prompt_of(4, 9), replace(GREEDY, max_tokens=40))
    tokens = tokens_of(run(look_ahead_engine(swarm, "off"), [request])["a"])
    place = next(i for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
    params = replace(request.params, stop_token_ids=(tokens[place],))
    engine = look_ahead_engine(swarm, mode)
    events = run(engine, [replace(request, params=params)])["a"]
    assert outcome(events) == (tokens[: place + 1], "stop", tokens[place], None)
    assert engine._look_ahead.num_ahead == place  # the last of them void
    assert engine._look_ahead.step is None
    assert engine._memory.pool.num_owned("kv") == 0
    assert engine._memory.adapters.num_pinned == 0


def test_an_abort_of_the_last_request_under_a_step_leaves_nothing_under_way(swarm):
    engine = look_ahead_engine(swarm, "late")
    engine.add(make_request("a", NAMES[1], prompt_of(1, 7)))
    while engine._look_ahead.step is None:
        engine.step()
    assert engine.abort("a").finish_reason == "abort"
    assert not engine.has_work
    assert engine._look_ahead.step is None
    assert engine._memory.pool.num_owned("kv") == 0
    assert engine._memory.adapters.num_pinned == 0
    engine.check()


def test_a_pool_that_is_too_small_for_all_preempts_and_answers_the_same(swarm):
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True)
    requests = [make_request(f"r{i}", None, prompt_of(i, 7 + i), params) for i in range(5)]
    expected = run(look_ahead_engine(swarm, "off"), requests)
    engine = look_ahead_engine(swarm, "late", pool_bytes=10 * make_page_bytes(swarm))
    events = run(engine, requests)
    assert engine.stats().total_preemptions > 0
    assert engine._look_ahead.num_ahead > 0
    assert {n: outcome(e) for n, e in events.items()} == {
        n: outcome(e) for n, e in expected.items()
    }


def test_sequences_that_are_preempted_under_a_step_answer_the_same(swarm):
    requests = [make_request(f"r{i}", name, prompt_of(i, 9)) for i, name in enumerate(NAMES[:3])]
    expected = run(look_ahead_engine(swarm, "off"), requests)
    engine = look_ahead_engine(swarm, "late")
    was_ahead = []

    def preempt_one(step):
        scheduler = engine._scheduler
        if step % 3 == 2 and scheduler._running:
            was_ahead.append(engine._look_ahead.step is not None)
            scheduler._preempt(scheduler._running[-1])
            scheduler.check()

    events = run(engine, requests, before_step=preempt_one)
    assert any(was_ahead)
    assert {n: tokens_of(e) for n, e in events.items()} == {
        n: tokens_of(e) for n, e in expected.items()
    }


def test_while_a_command_is_open_nothing_is_launched_ahead(swarm):
    engine = look_ahead_engine(swarm, "early")
    engine.add(make_request("a", None, prompt_of(1, 7), replace(GREEDY, max_tokens=40)))
    for _ in range(4):
        engine.step()
    assert engine._look_ahead.num_ahead > 0
    engine.begin_command(1, RescanAdapters())
    before = engine._look_ahead.num_ahead
    while engine._administration.is_busy and not (answers := engine.take_answers()):
        engine.step()
        assert engine._look_ahead.num_ahead in (before, before + 1)
    assert answers
    assert [event.finish_reason for event in engine.abort_all()] == ["abort"]
    assert engine._look_ahead.step is None
    assert engine._memory.pool.num_owned("kv") == 0


def test_an_engine_looks_ahead_where_its_device_computes_beside_it(swarm):
    engine = make_engine(swarm)
    run(engine, [make_request("a", None, prompt_of(1, 7))])
    assert (engine._look_ahead.num_ahead > 0) == (DEVICE.type == "cuda")
