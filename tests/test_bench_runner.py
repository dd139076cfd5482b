"""The runner in virtual time: what is sent when, and what is told about it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from loraswarm.bench.records import Clock, PlannedRequest, RequestRecord
from loraswarm.bench.runner import INTERRUPTED, Progress, is_complete, run
from loraswarm.errors import ConfigError
from virtual_time import run_virtually


@dataclass
class FakeTarget:
    """Answers request i after `duration_s(i)`; fails those of `failing`; acts before some."""

    duration_s: Callable[[int], float] = lambda index: 1.0
    failing: frozenset[int] = frozenset()
    before: dict[int, Callable[[], None]] = field(default_factory=dict)
    name: str = "fake"
    sent: list[int] = field(default_factory=list)
    num_in_flight: int = 0
    max_in_flight: int = 0

    async def send(self, request: PlannedRequest, clock: Clock) -> RequestRecord:
        start_s = clock()
        self.sent.append(request.index)
        self.num_in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
        self.before.get(request.index, lambda: None)()
        try:
            await asyncio.sleep(self.duration_s(request.index))
        finally:
            self.num_in_flight -= 1
        return RequestRecord(
            index=request.index,
            adapter=request.adapter,
            num_prompt=len(request.prompt_token_ids),
            max_tokens=request.max_tokens,
            start_s=start_s,
            response_s=(clock(),),
            num_output=request.max_tokens,
            error="broken" if request.index in self.failing else None,
        )

    async def close(self) -> None:
        pass


def planned(*arrivals_s: float | None, first: int = 0) -> list[PlannedRequest]:
    return [
        PlannedRequest(
            index=index,
            adapter=None,
            prompt_token_ids=(1, 2, 3),
            max_tokens=4,
            arrival_s=arrival_s,
        )
        for index, arrival_s in enumerate(arrivals_s, first)
    ]


def times(records: list[RequestRecord]) -> list[tuple[float, float]]:
    return [(record.start_s, record.response_s[-1]) for record in records]


def test_a_closed_loop_sends_the_next_request_when_one_ends():
    # Two places; durations 3 1 1 2: the second place does 1 and 2, then both end at 3.
    target = FakeTarget(lambda index: (3.0, 1.0, 1.0, 2.0, 1.0)[index])
    records = run_virtually(run(target, planned(*[None] * 5), concurrency=2))
    assert times(records) == [(0, 3), (0, 1), (1, 2), (2, 4), (3, 4)]
    assert target.max_in_flight == 2


def test_a_closed_loop_with_more_places_than_requests_sends_all_at_once():
    target = FakeTarget()
    records = run_virtually(run(target, planned(None, None, None), concurrency=7))
    assert times(records) == [(0, 1)] * 3


def test_an_open_loop_sends_at_the_arrivals_whatever_is_in_flight():
    target = FakeTarget(lambda index: 10.0)
    records = run_virtually(run(target, planned(0.5, 4.0, 1.25)))
    assert times(records) == [(0.5, 10.5), (4.0, 14.0), (1.25, 11.25)]
    assert target.sent == [0, 2, 1]
    assert target.max_in_flight == 3


def test_a_concurrency_bounds_an_open_loop_too():
    target = FakeTarget(lambda index: 2.0)
    records = run_virtually(run(target, planned(0.0, 0.5, 1.0), concurrency=1))
    assert times(records) == [(0, 2), (2, 4), (4, 6)]


def test_failed_requests_stay_among_the_records():
    target = FakeTarget(failing=frozenset({1}))
    requests = planned(None, None, None)
    records = run_virtually(run(target, requests, concurrency=3))
    assert [record.error for record in records] == [None, "broken", None]
    assert is_complete(requests, records)


def test_warm_up_is_sent_first_and_is_in_no_record(caplog):
    target = FakeTarget(failing=frozenset({101}))
    warmup = planned(50.0, 60.0, first=100)
    seen: list[Progress] = []
    records = run_virtually(
        run(target, planned(None), concurrency=2, warmup=warmup, progress=seen.append)
    )
    assert target.sent == [100, 101, 0]
    assert [p.elapsed_s for p in seen if p.is_warmup] == [1.0, 1.0]  # arrivals are ignored
    assert [record.index for record in records] == [0]
    assert records[0].start_s == 0.0  # the run's clock starts after the warm-up
    assert "warm-up failed num=1 first='broken'" in caplog.text


def test_progress_is_told_each_time_a_request_ends():
    seen: list[Progress] = []
    target = FakeTarget(failing=frozenset({0}))
    warmup = planned(None, first=100)
    run_virtually(
        run(target, planned(None, None), concurrency=1, warmup=warmup, progress=seen.append)
    )
    told = [(p.num_done, p.num_failed, p.num_output_tokens, p.elapsed_s) for p in seen]
    assert told == [(1, 0, 4, 1.0), (1, 1, 4, 1.0), (2, 1, 8, 2.0)]
    assert [p.is_warmup for p in seen] == [True, False, False]
    assert [p.num_requests for p in seen] == [1, 2, 2]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_gives_up_what_is_in_flight_and_keeps_what_there_is(caplog):
    target = FakeTarget(before={3: interrupt})
    requests = planned(*[None] * 7)

    async def work() -> list[RequestRecord]:
        before = signal.getsignal(signal.SIGINT)
        records = await run(target, requests, concurrency=2)
        assert signal.getsignal(signal.SIGINT) is before
        return records

    records = run_virtually(work())
    assert [record.index for record in records] == [0, 1, 2, 3]
    assert [record.error for record in records] == [None, None, INTERRUPTED, INTERRUPTED]
    assert target.num_in_flight == 0
    assert not is_complete(requests, records)
    assert "run interrupted in_flight=2" in caplog.text


def test_an_interrupt_between_arrivals_ends_an_open_loop():
    target = FakeTarget(before={0: interrupt}, duration_s=lambda index: 0.0)
    requests = planned(0.0, 1e9)
    records = run_virtually(run(target, requests))
    assert [record.index for record in records] == [0]
    assert not is_complete(requests, records)


def test_an_interrupt_also_records_what_waits_for_a_place(caplog):
    target = FakeTarget(lambda index: 10.0, before={0: lambda: None})
    requests = planned(0.0, 1.0, 2.0, 1e9)

    async def work() -> list[RequestRecord]:
        asyncio.get_running_loop().call_later(5.0, interrupt)
        return await run(target, requests, concurrency=1)

    records = run_virtually(work())
    assert target.sent == [0]
    assert [(one.index, one.start_s) for one in records] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert {one.error for one in records} == {INTERRUPTED}
    assert "run interrupted in_flight=1 waiting=2" in caplog.text


def test_an_interrupt_during_warm_up_sends_no_request():
    target = FakeTarget(before={100: interrupt})
    requests = planned(None)
    records = run_virtually(
        run(target, requests, concurrency=1, warmup=planned(None, None, first=100))
    )
    assert target.sent == [100]
    assert records == []
    assert not is_complete(requests, records)


def test_what_a_target_raises_is_not_swallowed():
    def broken() -> None:
        raise AssertionError("a bug")

    target = FakeTarget(before={1: broken})
    with pytest.raises(ExceptionGroup) as raised:
        run_virtually(run(target, planned(*[None] * 3), concurrency=1))
    assert raised.group_contains(AssertionError, match="a bug")


@pytest.mark.parametrize(
    ("arrivals_s", "concurrency", "message"),
    [
        ((None, None), None, "need a concurrency"),
        ((None, None), 0, "concurrency is 0"),
        ((None, 1.0, None), 1, "1 of 3 requests have an arrival"),
    ],
)
def test_requests_that_make_no_loop_are_refused(arrivals_s, concurrency, message):
    target = FakeTarget()
    with pytest.raises(ConfigError, match=message):
        run_virtually(run(target, planned(*arrivals_s), concurrency=concurrency))
    assert target.sent == []
