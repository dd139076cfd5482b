"""Freezing, thawing, releasing and adopting a request wherever it is, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from engine_factory import (
    GREEDY,
    make_engine,
    make_request,
    prompt_of,
    run_tokens,
    save_swarm,
    tokens_of,
)
from frozen_cases import assert_nothing_left, computed_tokens, finish, renamed, take
from loraswarm.core.admin import UnloadAdapter
from loraswarm.core.request import SamplingParams
from loraswarm.core.snapshot import SequenceSnapshot
from loraswarm.engine import setup
from loraswarm.errors import InvalidRequest, UnknownAdapter

LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
FIRST = make_request("first", "a000", prompt_of(1, 21), LONG)
SECOND = make_request("second", "a001", prompt_of(2, 50), LONG)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 2, ranks=(8,))
    return path


@pytest.fixture(scope="module")
def target(swarm):
    return make_engine(swarm)


@pytest.fixture(scope="module")
def answers(target):
    return run_tokens(target, [FIRST, SECOND])


def advanced(engine, request, num_tokens: int) -> list[int]:
    """Serve a request until it has so many tokens."""
    engine.add(request)
    tokens = []
    while len(tokens) < num_tokens:
        tokens += tokens_of(
            event for event in engine.step() if event.request_id == FIRST.request_id
        )
    return tokens


def rest_in(engine, snapshot) -> list[int]:
    engine.adopt(snapshot)
    return tokens_of(finish(engine)[snapshot.request_id])


def test_one_that_waits_for_its_adapter_freezes_and_goes_on_here_or_elsewhere(
    swarm, target, answers
):
    engine = make_engine(swarm)
    engine.add(FIRST)
    assert FIRST.request_id in engine._arrivals
    snapshot = take(engine, "first")
    assert (snapshot.output_token_ids, snapshot.kv) == ((), None)
    assert engine.stats().num_frozen == 1
    while FIRST.request_id in engine._arrivals:
        engine.step()
    for _ in range(3):
        assert not engine.step()
    assert (engine.stats().num_waiting, engine.stats().num_frozen) == (1, 1)
    assert engine.thaw("first")
    assert tokens_of(finish(engine)["first"]) == answers["first"]
    assert rest_in(target, snapshot) == answers["first"]
    assert_nothing_left(engine)


def test_one_that_waits_for_its_adapter_is_released_or_moved_on_with_all_that_it_has_brought(
    swarm, target, answers
):
    source, between = make_engine(swarm), make_engine(swarm)
    tokens = advanced(source, FIRST, 5)
    between.adopt(take(source, "first"))
    assert source.release("first")
    assert FIRST.request_id in between._arrivals
    snapshot = take(between, "first")
    assert snapshot.kv is not None
    assert between.release("first")
    counts = computed_tokens(target)
    assert tokens + rest_in(target, snapshot) == answers["first"]
    assert counts[0] == 1
    for engine in (source, between):
        assert_nothing_left(engine)
        engine.close()


def test_one_that_waits_for_a_seat_is_passed_over_and_keeps_its_place(swarm, answers):
    engine = make_engine(swarm, max_num_sequences=1, max_step_tokens=64)
    third = replace(FIRST, request_id="third")
    advanced(engine, FIRST, 1)
    events = []
    for request in (SECOND, third):
        engine.add(request)
    while SECOND.request_id in engine._arrivals:
        events += engine.step()
    snapshot = take(engine, "second")
    assert (snapshot.output_token_ids, snapshot.kv) == ((), None)
    while not any(event.finish_reason and event.request_id == "first" for event in events):
        events += engine.step()
    engine.step()
    assert engine._scheduler._running[0].request_id == "third"
    assert engine.thaw("second")
    found = finish(engine)
    assert tokens_of(found["second"]) == answers["second"]


def test_a_prompt_in_the_middle_goes_on_where_it_was_cut(swarm, target, answers):
    source = make_engine(swarm, max_step_tokens=8, max_num_sequences=4)
    source.add(SECOND)
    cuts = []
    while SECOND.request_id in source._arrivals or source._scheduler._running == []:
        source.step()
    while source._scheduler._running and not source._scheduler._running[0].num_output:
        snapshot = take(source, "second")
        num_computed = snapshot.kv.num_tokens if snapshot.kv else 0
        cuts.append(num_computed)
        counts = computed_tokens(target)
        target.adopt(renamed(snapshot, f"cut {num_computed}"))
        events = finish(target)[f"cut {num_computed}"]
        assert tokens_of(events) == answers["second"]
        assert events[0].queue_s == snapshot.queue_s
        assert sum(counts) == len(SECOND.prompt_token_ids) + LONG.max_tokens - 1 - num_computed
        assert source.thaw("second")
        source.step()
    assert cuts[-6:] == [8, 16, 24, 32, 40, 48]


def test_what_is_brought_is_what_is_used(swarm, target, answers):
    """Bytes that are other give another answer."""
    source = make_engine(swarm)
    tokens = advanced(source, FIRST, 3)
    snapshot = take(source, "first")
    assert tokens + rest_in(target, snapshot) == answers["first"]
    wrong = tuple(bytes(len(page)) for page in snapshot.kv.pages)
    forged = replace(snapshot, kv=replace(snapshot.kv, pages=wrong))
    assert tokens + rest_in(target, forged) != answers["first"]


def test_pages_whose_prefix_the_target_has_are_shared_and_the_others_become_cached(swarm, answers):
    source, target = (make_engine(swarm, prefix_caching=True) for _ in range(2))
    tokens = advanced(source, SECOND, 0)
    while len(tokens) < 20:
        tokens += tokens_of(source.step())
    snapshot = take(source, "second")
    num_page_tokens = target.info.page_tokens
    run_tokens(target, [replace(SECOND, request_id="before", params=GREEDY)])
    num_shared = (len(SECOND.prompt_token_ids) + GREEDY.max_tokens - 1) // num_page_tokens
    filled, fill = [], target._migration.fill
    target._migration.fill = lambda step: (filled.extend(step.fills), fill(step))
    assert tokens + rest_in(target, snapshot) == answers["second"]
    assert 0 < len(filled) == len(snapshot.kv.pages) - num_shared
    before = target.stats().total_prefix_hit_tokens
    after = replace(
        SECOND,
        request_id="after",
        prompt_token_ids=SECOND.prompt_token_ids + tuple(answers["second"][:35]),
        params=replace(LONG, max_tokens=5),
    )
    assert run_tokens(target, [after])["after"] == answers["second"][35:]
    assert (
        target.stats().total_prefix_hit_tokens - before == 84 // num_page_tokens * num_page_tokens
    )


def test_a_front_that_knows_what_it_has_sent_can_go_on_elsewhere(target):
    params = replace(LONG, temperature=1.3, seed=11, prompt_logprobs=0, logprobs=0)
    request = make_request("drawn", "a001", prompt_of(5, 19), params)
    answer = run_tokens(target, [request])["drawn"]
    for num_sent in range(LONG.max_tokens):
        snapshot = SequenceSnapshot(request=request, output_token_ids=tuple(answer[:num_sent]))
        target.adopt(snapshot)
        events = finish(target)["drawn"]
        assert tokens_of(events) == answer[num_sent:]
        scored = [event for event in events if event.prompt_logprobs is not None]
        assert len(scored) == (num_sent == 0)


def test_a_frozen_one_gives_way_first_and_comes_back(swarm, answers):
    roomy, second = make_engine(swarm), replace(SECOND, adapter="a000")
    answer = run_tokens(roomy, [second])["second"]
    page_tokens, page_bytes = roomy.info.page_tokens, roomy.info.page_bytes
    num_first, num_second, num_end = (-(-n // page_tokens) for n in (21 + 31, 50 + 1, 50 + 40))
    assert num_end > num_second
    num_pages = roomy.stats().num_adapter_pages + num_first + num_second
    engine = make_engine(swarm, pool_bytes=num_pages * page_bytes)
    tokens = advanced(engine, FIRST, 30)
    take(engine, "first")
    engine.add(second)
    events = []
    for _ in range(2 * LONG.max_tokens):
        events += engine.step()
        engine.check()
    assert tokens_of(events) == answer
    assert engine._scheduler.num_preemptions == 1
    assert engine.thaw("first")
    assert tokens + tokens_of(finish(engine)["first"]) == answers["first"]
    assert_nothing_left(engine)


def test_an_engine_with_nothing_but_frozen_requests_rests_and_waits_for_nobody(swarm):
    engine = make_engine(swarm)
    advanced(engine, FIRST, 2)
    take(engine, "first")
    for _ in range(3):
        assert engine.step(may_wait=True) == []
        assert engine.is_blocked
        assert engine.has_work
    assert engine.thaw("first")
    assert not engine.thaw("first")
    assert engine.step()
    take(engine, "first")
    (ended,) = engine.abort_all()
    assert (ended.request_id, ended.finish_reason) == ("first", "abort")
    assert_nothing_left(engine)


def test_a_frozen_request_that_is_aborted_ends_with_its_event(swarm):
    engine = make_engine(swarm)
    advanced(engine, FIRST, 2)
    take(engine, "first")
    assert engine.abort("first").finish_reason == "abort"
    assert not engine.thaw("first")
    assert_nothing_left(engine)


def test_what_is_not_open_or_not_frozen_is_said_and_left_alone(swarm, answers):
    engine = make_engine(swarm)
    assert engine.freeze("first", with_kv=True) == (None, [])
    assert not engine.thaw("first")
    assert not engine.release("first")
    tokens = advanced(engine, FIRST, 2)
    assert not engine.release("first")
    assert not engine.thaw("first")
    tokens += tokens_of(finish(engine)["first"])
    assert tokens == answers["first"]
    assert engine.freeze("first", with_kv=True) == (None, [])


def test_an_unload_waits_for_a_frozen_request_until_it_is_released(tmp_path):
    save_swarm(tmp_path, 1)
    engine = make_engine(tmp_path)
    advanced(engine, FIRST, 2)
    take(engine, "first")
    engine.begin_command(0, UnloadAdapter("a000"))
    for _ in range(3):
        engine.step(may_wait=False)
    assert engine.take_answers() == []
    assert engine.stats().num_pinned_adapters == 1
    assert engine.release("first")
    engine.step(may_wait=False)
    (answer,) = engine.take_answers()
    assert answer.result.state == "unloaded"
    assert engine.stats().num_adapter_pages == 0
    assert_nothing_left(engine)


def test_an_answer_without_limit_is_as_long_as_it_would_have_been(swarm, target):
    request = replace(FIRST, params=replace(LONG, max_tokens=None))
    source = make_engine(swarm, max_model_len=100)
    tokens = advanced(source, request, 3)
    tokens += rest_in(target, take(source, "first"))
    assert len(tokens) == 100 - len(FIRST.prompt_token_ids)
    assert source.thaw("first")
    assert tokens[3:] == tokens_of(finish(source)["first"])


def test_the_wait_at_the_source_counts(target):
    snapshot = SequenceSnapshot(request=FIRST, waited_s=1000.0)
    target.adopt(snapshot)
    assert 1000.0 <= finish(target)["first"][0].queue_s < 1100.0


def test_what_cannot_go_on_here_is_refused_and_goes_on_there(swarm, target, tmp_path, answers):
    source = make_engine(swarm)
    tokens = advanced(source, FIRST, 6)
    snapshot = take(source, "first")
    kv, request, outputs = snapshot.kv, snapshot.request, snapshot.output_token_ids
    drawn = replace(request, params=replace(LONG, temperature=1.0))
    scored = replace(request, params=replace(LONG, prompt_logprobs=0))
    stopped = replace(request, params=replace(LONG, stop_token_ids=outputs[-1:]))
    refused = [
        (replace(snapshot, kv=replace(kv, layout=kv.layout + " other")), "laid out"),
        (replace(snapshot, kv=replace(kv, pages=kv.pages[:-1])), "pages"),
        (replace(snapshot, kv=replace(kv, pages=(kv.pages[0][1:], *kv.pages[1:]))), "pages"),
        (replace(snapshot, kv=replace(kv, num_tokens=snapshot.num_tokens)), "fewer tokens"),
        (replace(snapshot, kv=replace(kv, num_tokens=0, pages=())), "fewer tokens"),
        (replace(snapshot, adapter_digests=None), "not what adapters"),
        (replace(snapshot, adapter_digests=("0",)), "other contents of 'a000'"),
        (replace(snapshot, adapter_digests=()), "none that act"),
        (replace(snapshot, output_token_ids=(*outputs, 10**6)), "vocabulary"),
        (replace(snapshot, request=drawn), "no seed"),
        (
            replace(snapshot, request=scored, output_token_ids=(), kv=replace(kv, num_tokens=20)),
            "lo",
        ),
        (replace(snapshot, request=stopped), "has ended"),
        (replace(snapshot, output_token_ids=(3,) * 40), "has ended"),
        (replace(snapshot, request=replace(request, params=replace(LONG, max_tokens=999))), "999"),
    ]
    for wrong, why in refused:
        with pytest.raises(InvalidRequest, match=why):
            target.adopt(wrong)
        assert_nothing_left(target)
    with pytest.raises(UnknownAdapter):
        target.adopt(replace(snapshot, request=replace(request, adapter="nobody")))
    with pytest.raises(InvalidRequest, match="already in use"):
        source.adopt(snapshot)
    assert_nothing_left(target)
    assert source.thaw("first")
    assert tokens + tokens_of(finish(source)["first"]) == answers["first"]


def test_other_contents_that_are_found_when_they_are_read_end_the_request(
    swarm, tmp_path, monkeypatch
):
    source = make_engine(swarm)
    advanced(source, FIRST, 2)
    snapshot = take(source, "first")
    shutil.copytree(swarm / "model", tmp_path / "model")
    (tmp_path / "adapters").mkdir()
    shutil.copytree(swarm / "adapters" / "a001", tmp_path / "adapters" / "a000")
    monkeypatch.setattr(setup, "DESCRIBING_S", -1.0)
    target = make_engine(tmp_path)
    assert target._catalog.entry_named("a000").info is None
    target.adopt(snapshot)
    (event,) = finish(target)["first"]
    assert event.finish_reason == "error"
    assert "other contents" in event.error.message
    assert_nothing_left(target)
