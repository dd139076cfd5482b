"""Sends planned requests to a target when they are due, and collects what came of them.

Closed loop: a new request the moment one ends. Open loop: each at its arrival. Knows nothing about
HTTP, engines or metrics. Called by the bench command.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraswarm.bench.records import PlannedRequest, RequestRecord, Target
from loraswarm.errors import ConfigError

INTERRUPTED = "interrupted"
Report = Callable[["Progress"], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is, each time a request ends; `num_failed` are among the `num_done`."""

    num_done: int
    num_failed: int
    num_requests: int
    num_output_tokens: int
    elapsed_s: float
    is_warmup: bool


async def run(
    target: Target,
    requests: Sequence[PlannedRequest],
    *,
    concurrency: int | None = None,
    warmup: Sequence[PlannedRequest] = (),
    progress: Report | None = None,
) -> list[RequestRecord]:
    """Send every request; the records in the requests' order.

    Requests without `arrival_s` are a closed loop with `concurrency` of them in flight. Those with
    it are an open loop; a `concurrency` then bounds how many are in flight, and the wait for a
    place is not part of a request's times, so that a slow target looks better than it is. `warmup`
    is sent before, `concurrency` at a time (one if that is None), and is in no record. After an
    interrupt (Ctrl-C) no more is sent, what is in flight or waits for a place is given up with the
    error `INTERRUPTED`, and the records there are
    are returned.
    Raises   ConfigError if requests and `concurrency` do not make a loop.
    """
    _check(requests, concurrency)
    with _interrupts() as stop:
        if warmup:
            await _warm_up(target, warmup, concurrency or 1, progress, stop)
        if stop.is_set():
            return []
        drive = _Drive(target, requests, concurrency, progress)
        return await drive.go(stop)


def is_complete(requests: Sequence[PlannedRequest], records: Sequence[RequestRecord]) -> bool:
    """Whether a run was not interrupted."""
    return len(records) == len(requests) and all(r.error != INTERRUPTED for r in records)


class _Drive:
    """One pass over a list of requests."""

    def __init__(
        self,
        target: Target,
        requests: Sequence[PlannedRequest],
        concurrency: int | None,
        report: Report | None,
        is_warmup: bool = False,
    ) -> None:
        self._target = target
        self._requests = requests
        self._concurrency = concurrency
        self._report = report
        self._is_warmup = is_warmup
        self._now = asyncio.get_running_loop().time
        self._start_s = self._now()
        self._records: list[RequestRecord] = []
        self._waiting: dict[int, tuple[PlannedRequest, float]] = {}
        self._in_flight: dict[int, tuple[PlannedRequest, float]] = {}
        self._num_failed = 0
        self._num_output = 0

    async def go(self, stop: asyncio.Event) -> list[RequestRecord]:
        """Until all have ended, or `stop` is set."""
        is_open = bool(self._requests) and self._requests[0].arrival_s is not None
        sending = asyncio.create_task(self._open_loop() if is_open else self._closed_loop())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            stopping.cancel()
            await asyncio.gather(sending, stopping, return_exceptions=True)
        given_up = [*self._in_flight.values(), *self._waiting.values()]
        if given_up:
            num_in_flight, num_waiting = len(self._in_flight), len(self._waiting)
            log.warning("run interrupted in_flight=%d waiting=%d", num_in_flight, num_waiting)
        left = [_interrupted(request, at_s) for request, at_s in given_up]
        return sorted(self._records + left, key=lambda record: record.index)

    async def _closed_loop(self) -> None:
        assert self._concurrency is not None
        queue = iter(self._requests)

        async def work() -> None:
            for request in queue:
                await self._send(request)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(self._requests))):
                group.create_task(work())

    async def _open_loop(self) -> None:
        places = asyncio.Semaphore(self._concurrency) if self._concurrency else None
        async with asyncio.TaskGroup() as group:
            for request in sorted(self._requests, key=_arrival_s):
                await asyncio.sleep(_arrival_s(request) - self._clock())
                group.create_task(self._send_in_place(request, places))

    async def _send_in_place(
        self, request: PlannedRequest, places: asyncio.Semaphore | None
    ) -> None:
        self._waiting[request.index] = request, self._clock()
        async with places or contextlib.nullcontext():
            del self._waiting[request.index]
            await self._send(request)

    async def _send(self, request: PlannedRequest) -> None:
        self._in_flight[request.index] = request, self._clock()
        record = await self._target.send(request, self._clock)
        del self._in_flight[request.index]
        self._records.append(record)
        self._num_failed += record.error is not None
        self._num_output += record.num_output
        if self._report is not None:
            self._report(self._progress())

    def _progress(self) -> Progress:
        return Progress(
            num_done=len(self._records),
            num_failed=self._num_failed,
            num_requests=len(self._requests),
            num_output_tokens=self._num_output,
            elapsed_s=self._clock(),
            is_warmup=self._is_warmup,
        )

    def _clock(self) -> float:
        return self._now() - self._start_s


async def _warm_up(
    target: Target,
    requests: Sequence[PlannedRequest],
    concurrency: int,
    report: Report | None,
    stop: asyncio.Event,
) -> None:
    """Send `requests` in a closed loop, whatever their arrivals; failures are only logged."""
    now = [replace(request, arrival_s=None) for request in requests]
    records = await _Drive(target, now, concurrency, report, is_warmup=True).go(stop)
    failed = [record for record in records if record.error is not None]
    if failed:
        log.warning("warm-up failed num=%d first=%r", len(failed), failed[0].error)


def _check(requests: Sequence[PlannedRequest], concurrency: int | None) -> None:
    num_timed = sum(request.arrival_s is not None for request in requests)
    if num_timed not in (0, len(requests)):
        raise ConfigError(
            f"{num_timed} of {len(requests)} requests have an arrival; all or none must have one"
        )
    if concurrency is None and requests and not num_timed:
        raise ConfigError("requests without arrivals need a concurrency")
    if concurrency is not None and concurrency < 1:
        raise ConfigError(f"concurrency is {concurrency}; it must be >= 1")


def _arrival_s(request: PlannedRequest) -> float:
    assert request.arrival_s is not None
    return request.arrival_s


def _interrupted(request: PlannedRequest, start_s: float) -> RequestRecord:
    return RequestRecord(
        index=request.index,
        adapter=request.adapter,
        num_prompt=len(request.prompt_token_ids),
        max_tokens=request.max_tokens,
        start_s=start_s,
        response_s=(),
        num_output=0,
        error=INTERRUPTED,
    )


@contextlib.contextmanager
def _interrupts() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C sets instead of what it does otherwise; only in the main thread, since
    others get no signals."""
    stop = asyncio.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    loop = asyncio.get_running_loop()
    before: Any = signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
