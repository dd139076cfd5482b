"""One step ahead: the same tokens and ends as without, and no page given away under a step.

Over a stand-in device that computes as late as it may; tests/test_look_ahead_engine.py has engines.
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch

from device_under_test import DEVICE
from engine_factory import GREEDY, tokens_of
from late_device import END, LateDevice, drawn_after
from loraswarm.core.request import SamplingParams
from loraswarm.engine.fetch import Fetch
from loraswarm.engine.look_ahead import LookAhead, foresee
from loraswarm.engine.policies import FirstComeFirstServed
from loraswarm.engine.prepare import LogitRows
from loraswarm.engine.results import StepResults
from loraswarm.engine.scheduler import StepLimits
from loraswarm.engine.step import ScheduledChunk, Step
from loraswarm.engine.supply import EverythingAtHand
from loraswarm.memory.memory import Memory, MemoryOptions
from scheduler_cases import GEOMETRY, SHAPE, InstantCopies, make_info, make_sequence


class Served:
    """A scheduler and a late device, driven as an engine does."""

    def __init__(self, num_pages: int, is_on: bool = True, num_seats: int = 6) -> None:
        options = MemoryOptions(policy="lru")
        self.memory = Memory.of_pages(num_pages, SHAPE, GEOMETRY, options)
        limits = StepLimits(num_seats, 24)
        policy, supply = FirstComeFirstServed(), EverythingAtHand()
        self.scheduler = InstantCopies(self.memory, policy, supply, limits)
        self.device = LateDevice(self.memory)
        self.ahead = LookAhead(self.device, self.scheduler, self.memory.kv_cache, is_on)
        self.events: dict[str, list] = {}

    def add(self, sequence, *infos) -> None:
        self.events[sequence.request_id] = []
        self.scheduler.add(sequence, infos)

    def abort(self, request_id: str) -> None:
        self._note([self.scheduler.abort(request_id)])
        self.ahead.drop_void()
        self.scheduler.check()

    def step(self) -> Step:
        step = self.ahead.step or self.scheduler.plan()
        if step.chunks:
            results, seconds = self.ahead.run(step, True)
            assert seconds >= 0
            self._note(self.scheduler.commit(step, results))
            self.ahead.drop_void()
        self.scheduler.check()
        return step

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()
        assert self.ahead.step is None
        assert not self.device.under_way
        assert self.memory.pool.num_owned("kv") == self.memory.prefixes.num_used_pages == 0
        assert self.memory.adapters.num_pinned == 0

    def _note(self, events) -> None:
        for event in events:
            assert not any(each.finish_reason for each in self.events[event.request_id])
            self.events[event.request_id].append(event)


def undisturbed(sequence) -> tuple[list[int], str]:
    """The answer of a sequence of the stand-in model by itself, and how it ends."""
    tokens = list(sequence.request.prompt_token_ids)
    while len(tokens) < sequence.num_prompt + sequence.max_tokens:
        token = drawn_after(tokens)
        if token is None:
            return tokens[sequence.num_prompt :], "error"
        tokens.append(token)
        if token == END:
            return tokens[sequence.num_prompt :], "stop"
    return tokens[sequence.num_prompt :], "length"


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_over_a_late_device_is_answered_as_undisturbed(seed):
    rng = Random(seed)
    infos = [make_info(f"a{i}", rank=4, num_sites=rng.randint(1, 6)) for i in range(4)]
    served = Served(num_pages=rng.choice([9, 16, 60]), num_seats=rng.choice([3, 6]))
    sequences, aborted = {}, set()
    for name in (f"{i:02}" for i in range(40)):
        info = rng.sample(infos, rng.choice([0, 0, 1, 1, 2]))
        sequence = make_sequence(name, rng.choice([1, 3, 7, 33, 50]), rng.randint(1, 45), *info)
        sequences[name] = sequence
        served.add(sequence, *info)
        for _ in range(rng.choice([0, 0, 1, 4, 15])):
            served.step()
        alive = [n for n, events in served.events.items() if not events or is_open(events)]
        if alive and rng.random() < 0.2:
            aborted.add(victim := rng.choice(alive))
            served.abort(victim)
    served.finish()
    for name, sequence in sequences.items():
        tokens, reason = undisturbed(sequence)
        found, last = tokens_of(served.events[name]), served.events[name][-1]
        if name in aborted:
            assert (found, last.finish_reason) == (tokens[: len(found)], "abort")
        else:
            assert (found, last.finish_reason) == (tokens, reason)
    assert served.ahead.num_ahead > 20


def is_open(events) -> bool:
    return events[-1].finish_reason is None


def test_the_random_traffic_has_every_kind_of_end_and_preempts():
    """What the test above proves depends on it."""
    served = Served(num_pages=9)
    for index in range(30):
        served.add(make_sequence(f"{index:02}", 20, 3 + 3 * index))
    served.finish()
    reasons = {events[-1].finish_reason for events in served.events.values()}
    assert reasons == {"stop", "length", "error"}
    assert served.scheduler.num_preemptions > 0


def test_without_look_ahead_nothing_is_launched_ahead():
    served = Served(num_pages=30, is_on=False)
    served.add(make_sequence("a", 5, 30))
    served.finish()
    assert served.ahead.num_ahead == 0


def test_every_step_of_a_lone_decode_is_launched_ahead_and_each_call_ends_one():
    served = Served(num_pages=30)
    sequence = make_sequence("a", 5, 12)
    served.add(sequence)
    for num_tokens in range(1, len(undisturbed(sequence)[0]) + 1):
        served.step()
        assert len(served.events["a"]) == num_tokens == sequence.num_output
    assert undisturbed(sequence)[1] == "length"
    assert served.ahead.num_ahead == 10  # not the prompt's step, nor that after it


def ending_pair() -> tuple:
    """A sequence that ends with the end token, and one that goes on longer."""
    names = [f"{i:03}" for i in range(200)]
    ends = [(n, *undisturbed(make_sequence(n, 5, 20))) for n in names]
    short = next(n for n, tokens, reason in ends if reason == "stop" and 4 < len(tokens) < 9)
    long = next(n for n, tokens, reason in ends if len(tokens) == 20)
    return make_sequence(short, 5, 20), make_sequence(long, 5, 20)


def test_what_ends_while_a_step_is_ahead_keeps_its_pages_until_that_has_run():
    short, long = ending_pair()
    served = Served(num_pages=30)
    served.add(short)
    served.add(long)
    while not served.events[short.request_id] or is_open(served.events[short.request_id]):
        served.step()
    assert served.ahead.step is not None
    assert served.memory.kv_cache.pages_of(short.request_id)
    num_events = len(served.events[short.request_id])
    served.step()
    assert not served.memory.kv_cache.pages_of(short.request_id)
    assert len(served.events[short.request_id]) == num_events
    served.finish()
    assert tokens_of(served.events[long.request_id]) == undisturbed(long)[0]


def test_an_abort_of_all_leaves_nothing_under_way():
    served = Served(num_pages=30)
    for name in ("a", "b"):
        served.add(make_sequence(name, 5, 12))
    for _ in range(3):
        served.step()
    assert served.ahead.step is not None
    served.abort("a")
    assert served.ahead.step is not None
    served.abort("b")
    served.finish()
    assert served.memory.pool.num_owned("kv") == 0


def test_a_request_of_the_same_name_may_follow_an_abort_at_once():
    served = Served(num_pages=30)
    for name in ("a", "b"):
        served.add(make_sequence(name, 5, 12))
    for _ in range(3):
        served.step()
    served.abort("a")
    again = make_sequence("a", 7, 12)
    served.add(again)
    served.finish()
    assert tokens_of(served.events["a"]) == undisturbed(again)[0]


def running(served: Served, *sequences) -> Step:
    """Sequences that all decode, and a step that has not been committed."""
    for sequence in sequences:
        served.add(sequence)
    while any(sequence.num_output == 0 for sequence in sequences):
        served.step()
    return served.scheduler.plan()


def test_a_step_is_foreseen_behind_the_tokens_of_the_one_before():
    served = Served(num_pages=30, is_on=False)
    step = running(served, make_sequence("a", 5, 12), make_sequence("b", 9, 12))
    following = foresee(step)
    assert [(c.sequence, c.begin, c.end) for c in following.chunks] == [
        (c.sequence, c.begin + 1, c.end + 1) for c in step.chunks
    ]
    assert all(chunk.samples for chunk in following.chunks)
    assert foresee(following) is not None


def test_no_step_is_foreseen_after_a_prompt_a_last_token_or_the_begin_of_an_adapter():
    sequence = make_sequence("a", 5, 2)
    assert foresee(Step((ScheduledChunk(sequence, 5),))) is None
    assert foresee(Step((ScheduledChunk(sequence, 4),))) is None
    sequence.token_ids.append(3)
    sequence.num_computed = 5
    assert foresee(Step((ScheduledChunk(sequence, 1),))) is None
    longer = make_sequence("b", 5, 3)
    longer.num_computed = 4
    assert foresee(Step((ScheduledChunk(longer, 1),))) is not None
    longer.first_adapted = 5
    assert foresee(Step((ScheduledChunk(longer, 1),))) is None


def test_a_step_is_extended_only_if_nobody_else_is_to_be_planned():
    served = Served(num_pages=30, is_on=False, num_seats=2)
    step = running(served, make_sequence("a", 5, 12))
    served.add(make_sequence("b", 5, 12))
    assert not served.scheduler.try_extend(foresee(step)), "a seat is free for it"
    step = served.scheduler.plan()
    assert not served.scheduler.try_extend(foresee(replace(step, chunks=step.chunks[:1])))
    while any(sequence.num_output == 0 for sequence in served.scheduler._running):
        served.step()
    served.add(make_sequence("c", 5, 12))
    assert served.scheduler.try_extend(foresee(served.scheduler.plan())), "no seat is free for it"
    with pytest.raises(AssertionError, match="foreseen"):
        served.scheduler.plan()


def test_a_step_is_extended_by_free_pages_only_and_evicts_nothing():
    served = Served(num_pages=3, is_on=False)
    served.add(make_sequence("idle", 17, 1))
    served.finish()
    sequence = next(s for s in (make_sequence(f"{i:03}", 5, 40) for i in range(200)) if is_long(s))
    step = running(served, sequence)
    pages_of, memory = served.memory.kv_cache.pages_of, served.memory
    for num_tokens, may_extend in ((16, True), (32, False)):
        while len(sequence.token_ids) < num_tokens:
            served.step()
            step = served.scheduler.plan()
        num_pages = num_tokens // GEOMETRY.page_tokens
        assert len(pages_of(sequence.request_id)) == num_pages
        assert served.scheduler.try_extend(foresee(step)) == may_extend
        assert len(pages_of(sequence.request_id)) == num_pages + may_extend
        assert memory.prefixes.total_evicted_pages == 0
        served.scheduler.settle()
    assert memory.pool.num_free == 0
    assert memory.prefixes.num_idle_pages == 1


def is_long(sequence) -> bool:
    return undisturbed(sequence)[1] == "length"


def rows_of(*params: SamplingParams) -> tuple[LogitRows, ...]:
    rows = []
    for index, own in enumerate(params):
        sequence = make_sequence(f"r{index}", 3, 9)
        sequence.request = replace(sequence.request, params=own)
        sequence.num_computed = 2
        rows.append(LogitRows(ScheduledChunk(sequence, 1), index, range(0), 0))
    return tuple(rows)


def test_greedy_rows_are_drawn_before_their_logits_are_written_again():
    logits_ZV = torch.randn(2, 60, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = logits_ZV.argmax(dim=1).tolist()
    results = StepResults(logits_ZV, rows_of(GREEDY, GREEDY))
    logits_ZV.fill_(math.nan)
    assert results.draw().tolist() == expected
    assert [result.token_id for result in results.wait()] == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=0.0, presence_penalty=0.5),
        SamplingParams(temperature=0.0, logit_bias={3: 1.0}),
        SamplingParams(temperature=0.0, min_tokens=2),
        SamplingParams(temperature=0.0, logprobs=1),
    ],
)
def test_rows_that_need_more_than_their_logits_are_drawn_when_asked_for(params):
    logits_ZV = torch.zeros(2, 60, device=DEVICE)
    results = StepResults(logits_ZV, rows_of(GREEDY, params))
    logits_ZV[:, 17] = 50.0
    assert [result.token_id for result in results.wait()] == [17, 17]


def test_what_is_fetched_may_be_written_again_on_a_device():
    tensor = torch.arange(7, device=DEVICE)
    fetch = Fetch(tensor, tensor.float() / 2)
    if DEVICE.type == "cuda":
        tensor.zero_()
    assert fetch.wait() == [list(range(7)), [i / 2 for i in range(7)]]
