"""The scheduler alone, with a stand-in for the model: order, budgets, preemption, conservation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from loraswarm.core.events import ErrorInfo, TokenLogprob
from loraswarm.engine.policies import FirstComeFirstServed
from loraswarm.engine.scheduler import Scheduler, StepLimits
from loraswarm.engine.step import ChunkResult
from loraswarm.engine.supply import EverythingAtHand
from loraswarm.memory.memory import Memory
from scheduler_cases import (
    GEOMETRY,
    SHAPE,
    InstantCopies,
    expected_output,
    make_info,
    make_odd_info,
    make_scheduler,
    make_sequence,
    results_of,
)

PAGE = GEOMETRY.page_tokens


def run(scheduler, sequences, max_steps=10_000):
    """Step until idle; returns tokens and terminal reasons by request id."""
    tokens = {sequence.request_id: [] for sequence in sequences}
    ends = {}
    for _ in range(max_steps):
        if not scheduler.has_work:
            break
        step = scheduler.plan()
        scheduler.check()
        for event in scheduler.commit(step, results_of(step)):
            assert event.request_id not in ends, "an event after the terminal one"
            tokens[event.request_id] += event.token_ids
            if event.finish_reason:
                ends[event.request_id] = event.finish_reason
    assert not scheduler.has_work
    return tokens, ends


def test_long_prompt_is_computed_in_chunks_beside_decodes():
    scheduler, _ = make_scheduler(num_pages=64, max_step_tokens=8)
    scheduler.add(make_sequence("short", 3, 20), [])
    step = scheduler.plan()
    scheduler.commit(step, results_of(step))
    scheduler.add(make_sequence("long", 20, 2), [])
    sizes = []
    for _ in range(4):
        step = scheduler.plan()
        assert step.num_tokens <= 8
        sizes.append([chunk.num_tokens for chunk in step.chunks])
        scheduler.commit(step, results_of(step))
    assert sizes == [[1, 7], [1, 7], [1, 6], [1, 1]]


def test_tokens_whose_prompts_are_scored_are_few_in_a_step_and_others_fill_it(monkeypatch):
    monkeypatch.setattr("loraswarm.engine.step_budget.MAX_SCORED_TOKENS", 5)
    scheduler, _ = make_scheduler(num_pages=64, max_step_tokens=16)
    sequences = [make_sequence(name, num, 2) for name, num in (("a", 7), ("b", 4), ("c", 20))]
    for sequence in sequences[:2]:
        params = replace(sequence.request.params, prompt_logprobs=0)
        sequence.request = replace(sequence.request, params=params)
        sequence.prompt_logprobs = [None]
    for sequence in sequences:
        scheduler.add(sequence, [])
    sizes = []
    for _ in range(4):
        step = scheduler.plan()
        sizes.append({chunk.sequence.request_id: chunk.num_tokens for chunk in step.chunks})
        logprob = TokenLogprob(1, -1.0, 1, ())
        scores = {"a": (logprob,) * sizes[-1].get("a", 0), "b": (logprob,) * sizes[-1].get("b", 0)}
        results = [
            replace(result, prompt_logprobs=scores.get(chunk.sequence.request_id, ()))
            for chunk, result in zip(step.chunks, results_of(step), strict=True)
        ]
        scheduler.commit(step, results)
    assert sizes == [
        {"a": 5, "c": 11},
        {"a": 2, "b": 3, "c": 9},
        {"a": 1, "b": 1, "c": 1},
        {"b": 1},
    ]


def test_oldest_is_admitted_first_and_seats_are_limited():
    scheduler, _ = make_scheduler(num_pages=64, max_num_sequences=2)
    for name in ("a", "b", "c"):
        scheduler.add(make_sequence(name, 2, 3), [])
    step = scheduler.plan()
    assert [chunk.sequence.request_id for chunk in step.chunks] == ["a", "b"]
    assert scheduler.num_waiting == 1


def test_when_pages_run_out_the_youngest_is_preempted_and_answers_stay_the_same():
    scheduler, memory = make_scheduler(num_pages=6)
    sequences = [make_sequence(f"s{i}", PAGE - 2 + i, 3 * PAGE) for i in range(4)]
    for sequence in sequences:
        scheduler.add(sequence, [])
    tokens, ends = run(scheduler, sequences)
    assert scheduler.num_preemptions > 0
    assert set(ends.values()) == {"length"}
    for sequence in sequences:
        assert tokens[sequence.request_id] == expected_output(sequence)
    assert memory.pool.num_free == 6


def test_an_idle_adapter_makes_room_for_k_v_and_for_other_adapters():
    info_a, info_b = make_info("a"), make_info("b")
    pages = make_scheduler(99)[1].adapters.num_pages(info_a)
    scheduler, memory = make_scheduler(num_pages=pages + 3)
    first = make_sequence("first", 4, 2, info_a)
    scheduler.add(first, [info_a])
    run(scheduler, [first])
    assert memory.adapters.is_resident(info_a.key)
    second = make_sequence("second", 4, 2, info_b)
    scheduler.add(second, [info_b])
    step = scheduler.plan()
    assert step.dropped == (info_a.key,)
    assert [load.info.name for load in step.loads] == ["b"]
    scheduler.commit(step, results_of(step))
    run(scheduler, [second])


def test_a_small_adapter_evicts_no_more_than_leave_it_a_gap():
    tiny = [make_info(f"a{i}", rank=1, num_sites=2) for i in range(40)]
    scheduler, memory = make_scheduler(num_pages=5, max_num_sequences=1)
    names = []
    for info in tiny:
        sequence = make_sequence(info.name, 2 * PAGE, 1, info)
        scheduler.add(sequence, [info])
        step = scheduler.plan()
        names.append([key[0] for key in step.dropped])
        scheduler.commit(step, results_of(step))
    assert memory.pool.num_owned("adapter") == 2
    evicting = [evicted for evicted in names if evicted]
    assert 0 < len(evicting) < len(tiny)
    assert all(len(evicted) == 1 for evicted in evicting)


def test_admission_that_cannot_succeed_evicts_nothing():
    idle, wanted = make_info("idle"), make_info("wanted", rank=64)
    scheduler, memory = make_scheduler(num_pages=40)
    done = make_sequence("done", 2, 1, idle)
    scheduler.add(done, [idle])
    run(scheduler, [done])
    running = make_sequence("running", 20 * PAGE, 5)
    scheduler.add(running, [])
    step = scheduler.plan()
    scheduler.commit(step, results_of(step))
    scheduler.add(make_sequence("blocked", 2, 1, wanted), [wanted])
    step = scheduler.plan()
    assert scheduler.num_waiting == 1
    assert not step.dropped
    assert memory.adapters.is_resident(idle.key)


def test_sequences_of_one_adapter_load_it_once():
    info = make_info("a")
    scheduler, memory = make_scheduler(num_pages=64)
    for name in ("x", "y"):
        scheduler.add(make_sequence(name, 3, 2, info), [info])
    step = scheduler.plan()
    assert len(step.loads) == 1
    assert memory.adapters.num_pinned == 1


def test_a_failed_copy_ends_its_own_requests_only_and_gives_back_pages():
    good, bad = make_info("good"), make_info("bad")
    scheduler, memory = make_scheduler(num_pages=64, kind=Scheduler)
    scheduler.add(make_sequence("g", 3, 2, good), [good])
    scheduler.add(make_sequence("b", 3, 2, bad), [bad])
    assert not scheduler.plan().chunks
    memory.adapters.finish_load(good.key)
    memory.adapters.fail_load(bad.key)
    events = scheduler.fail_adapters({bad.key: ErrorInfo("broken", "adapter_error", 422)})
    assert [(e.request_id, e.finish_reason, e.error.message) for e in events] == [
        ("b", "error", "broken")
    ]
    step = scheduler.plan()
    assert [chunk.sequence.request_id for chunk in step.chunks] == ["g"]
    assert not memory.adapters.is_resident(bad.key)
    scheduler.commit(step, results_of(step))
    scheduler.check()


def test_others_run_while_an_adapter_is_on_its_way_into_its_pages():
    info = make_info("slow")
    scheduler, memory = make_scheduler(num_pages=64, kind=Scheduler)
    scheduler.add(make_sequence("slow", 3, 2, info), [info])
    scheduler.add(make_sequence("base", 3, 4), [])
    for _ in range(3):
        step = scheduler.plan()
        assert [chunk.sequence.request_id for chunk in step.chunks] == ["base"]
        scheduler.commit(step, results_of(step))
        scheduler.check()
    memory.adapters.finish_load(info.key)
    step = scheduler.plan()
    assert {chunk.sequence.request_id for chunk in step.chunks} == {"slow", "base"}


class NotAtHand(EverythingAtHand):
    """A supply that lacks some adapters and remembers which were wanted."""

    def __init__(self, *absent):
        self.absent, self.wanted = set(absent), []

    def is_at_hand(self, key):
        return key not in self.absent

    def want(self, key):
        self.wanted.append(key)


def test_a_request_whose_adapter_is_not_at_hand_is_overtaken_and_not_forgotten():
    info = make_info("away")
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    supply = NotAtHand(info.key)
    scheduler = InstantCopies(memory, FirstComeFirstServed(), supply, StepLimits(8, 32))
    scheduler.add(make_sequence("away", 3, 2, info), [info])
    scheduler.add(make_sequence("base", 3, 2), [])
    step = scheduler.plan()
    assert [chunk.sequence.request_id for chunk in step.chunks] == ["base"]
    assert supply.wanted == [info.key]
    scheduler.commit(step, results_of(step))
    supply.absent.clear()
    step = scheduler.plan()
    assert {chunk.sequence.request_id for chunk in step.chunks} == {"away", "base"}
    supply.absent.add(info.key)
    error = ErrorInfo("gone", "store_error", 503)
    assert scheduler.fail_waiting(info.key, error) == []


def test_a_shared_prefix_is_computed_once():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    scheduler = InstantCopies(
        memory, FirstComeFirstServed(), EverythingAtHand(), StepLimits(8, 512)
    )
    first = make_sequence("aa", 3 * PAGE + 2, 2)
    again = make_sequence("aa", 3 * PAGE + 2, 2)
    again.request = replace(again.request, request_id="again")
    answers = []
    for sequence in (first, again):
        scheduler.add(sequence, [])
        step = scheduler.plan()
        answers.append(step.num_tokens)
        (event,) = scheduler.commit(step, results_of(step))
        answers.append(event.num_cached_tokens)
        run(scheduler, [sequence])
    assert answers == [3 * PAGE + 2, 0, 2, 3 * PAGE]
    assert first.token_ids == again.token_ids


def test_a_row_that_is_not_finite_ends_alone():
    scheduler, _memory = make_scheduler(num_pages=64)
    for name in ("a", "b"):
        scheduler.add(make_sequence(name, 3, 2), [])
    step = scheduler.plan()
    error = ErrorInfo("not finite", "engine_error", 500)
    events = scheduler.commit(step, [ChunkResult(error=error), ChunkResult(5)])
    assert [(e.request_id, e.finish_reason) for e in events] == [("a", "error"), ("b", None)]
    assert scheduler.num_running == 1


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3])
def test_abort_at_any_time_frees_everything(steps_before):
    info = make_info("a")
    scheduler, memory = make_scheduler(num_pages=64, max_step_tokens=8)
    sequence = make_sequence("x", 18, 9, info)
    scheduler.add(sequence, [info])
    for _ in range(steps_before):
        step = scheduler.plan()
        scheduler.commit(step, results_of(step))
    event = scheduler.abort("x")
    assert event.finish_reason == "abort"
    assert scheduler.abort("x") is None
    assert memory.pool.num_owned("kv") == 0
    assert memory.adapters.num_pinned == 0
    scheduler.check()


def test_end_token_stops_only_after_min_tokens():
    scheduler, _ = make_scheduler(num_pages=64)
    sequence = make_sequence("x", 3, 9)
    scheduler.add(sequence, [])
    step = scheduler.plan()
    (event,) = scheduler.commit(step, [ChunkResult(0)])
    assert event.finish_reason == "stop"
    assert event.stop_token_id == 0


def test_random_traffic_loses_nothing_and_leaks_nothing():
    rng = random.Random(1)
    infos = [make_info(f"a{i}", rank=rng.choice([2, 8, 24])) for i in range(6)]
    scheduler, memory = make_scheduler(num_pages=24, max_step_tokens=16)
    sequences, ends, tokens = {}, {}, {}
    for operation in range(4000):
        if rng.random() < 0.15 and len(sequences) < 300:
            chosen = rng.sample(infos, rng.choice([0, 1, 1, 2, 3]))
            name = f"r{operation}"
            sequence = make_sequence(name, rng.randrange(1, 50), rng.randrange(1, 30), *chosen)
            longest = scheduler.max_sequence_tokens(chosen)
            if sequence.num_prompt + sequence.max_tokens <= longest:
                scheduler.add(sequence, chosen)
                sequences[name] = sequence
        if sequences and rng.random() < 0.01:
            event = scheduler.abort(rng.choice(sorted(sequences)))
            if event:
                ends[event.request_id] = "abort"
        if scheduler.has_work:
            step = scheduler.plan()
            for event in scheduler.commit(step, results_of(step)):
                assert event.request_id not in ends
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish_reason:
                    ends[event.request_id] = event.finish_reason
            scheduler.check()
    while scheduler.has_work:
        step = scheduler.plan()
        for event in scheduler.commit(step, results_of(step)):
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason:
                ends[event.request_id] = event.finish_reason
    assert scheduler.num_preemptions > 0
    assert ends.keys() == sequences.keys()
    finished = [name for name, reason in ends.items() if reason == "length"]
    assert len(finished) > 50
    for name in finished:
        assert tokens[name] == expected_output(sequences[name])
    assert memory.pool.num_owned("kv") == 0
    assert memory.adapters.num_pinned == 0


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_accepted_runs_in_a_pool_with_room_for_little_else(seed):
    rng = random.Random(seed)
    scheduler, _ = make_scheduler(num_pages=14, max_step_tokens=512)
    infos = [
        make_odd_info(f"a{i}", sorted(rng.sample(range(14), rng.randint(1, 12))), rng)
        for i in range(20)
    ]
    num_accepted = 0
    for index in range(80):
        chosen = rng.sample(infos, rng.randint(1, 3))
        longest = scheduler.max_sequence_tokens(chosen)
        total = longest - rng.randint(0, 40) if rng.random() < 0.4 else rng.randint(2, 20)
        if 2 <= total <= longest:
            num_answer = rng.randint(1, min(3, total - 1))
            sequence = make_sequence(f"r{index}", total - num_answer, num_answer, *chosen)
            scheduler.add(sequence, chosen)
            num_accepted += 1
        for _ in range(rng.randint(0, 3)):
            step = scheduler.plan()
            scheduler.commit(step, results_of(step))
            scheduler.check()
    assert num_accepted > 20
    for _ in range(3000):
        if not scheduler.has_work:
            return
        step = scheduler.plan()
        scheduler.commit(step, results_of(step))
    raise AssertionError("work is left after 3,000 steps")
