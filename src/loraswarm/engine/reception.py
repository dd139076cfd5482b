"""From a request to a sequence in the scheduler's queue, by way of adapters that must come first.

Owns requests whose adapters are on their way, and which contents each open request uses. Used by
the engine, which tells it what has come, failed and ended.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable
from dataclasses import replace

from loraswarm.adapters.catalog import Catalog, Entry
from loraswarm.core.events import ErrorInfo, ReportedError, SequenceEvent
from loraswarm.core.request import Request
from loraswarm.core.sequence import AdapterKey
from loraswarm.core.snapshot import SequenceSnapshot
from loraswarm.engine.arrivals import Arrival
from loraswarm.engine.residency import Residency
from loraswarm.engine.scheduler import Scheduler
from loraswarm.engine.sequence_maker import SequenceMaker
from loraswarm.engine.states import AdapterStates
from loraswarm.errors import InvalidRequest, LoRASwarmError, StoreError


class Reception:
    """Requests of one engine, from their arrival to the scheduler's queue."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        scheduler: Scheduler,
        sequences: SequenceMaker,
        states: AdapterStates,
        seeds: random.Random,
    ) -> None:
        """`seeds` gives one to each request that has none."""
        self._catalog = catalog
        self._residency = residency
        self._scheduler = scheduler
        self._sequences = sequences
        self._states = states
        self._arrivals = states.arrivals
        self._seeds = seeds
        self._used: dict[str, list[AdapterKey]] = {}
        self._orders = itertools.count()

    @property
    def open_ids(self) -> list[str]:
        """Requests that have not ended."""
        return list(self._used)

    def receive(self, request: Request, snapshot: SequenceSnapshot | None = None) -> None:
        """Queue a request, or let it wait for its adapters; raises as Engine.add.

        With `snapshot`, which must have been checked, it goes on from there.
        """
        if request.request_id in self._used:
            raise InvalidRequest(f"request id {request.request_id!r} is already in use")
        entries = [self._catalog.resolve(name) for name, _ in request.weighted_adapters]
        self._sequences.check(request)
        seed = request.params.seed
        if seed is None:
            seed = self._seeds.getrandbits(64)
        arrived_s = time.monotonic() - (snapshot.waited_s if snapshot else 0.0)
        arrival = Arrival(request, entries, seed, next(self._orders), arrived_s, snapshot)
        is_known = all(entry.info is not None for entry in entries)
        if is_known and not self._sequences.make(arrival)[1]:
            arrival.entries = entries = []
            if snapshot is not None:
                arrival.snapshot = replace(snapshot, adapter_digests=())
        errors = [error for entry in entries if (error := self._residency.bring(entry))]
        if errors:
            raise ReportedError(errors[0])
        self._states.count(entries)
        self._used[request.request_id] = []
        for entry in entries:
            self._use(arrival, entry)
        if all(map(self._residency.is_within_reach, entries)):
            self._schedule(arrival)
        else:
            self._arrivals.add(arrival)

    def arrival_of(self, request_id: str) -> Arrival | None:
        """A request that waits for its adapters; None if it does not."""
        return self._arrivals.get(request_id)

    def abort(self, request_id: str) -> SequenceEvent | None:
        """End a request that waits for its adapters; None if it does not."""
        arrival = self._arrivals.remove(request_id)
        if arrival is None:
            return None
        self._release(arrival)
        return SequenceEvent(request_id=request_id, finish_reason="abort")

    def on_arrived(self, wanted: Entry, entry: Entry) -> list[SequenceEvent]:
        """What was wanted has come, as `entry`; returns the ends of requests it cannot serve."""
        events: list[SequenceEvent] = []
        if wanted.info is not None and wanted.key != entry.key:
            error = _replaced(wanted.name)
            events += self._scheduler.fail_waiting(wanted.key, error)
        for arrival in self._arrivals.waiting_for(wanted):
            self._arrivals.remove(arrival.request.request_id)
            place = next(i for i, e in enumerate(arrival.entries) if e.name == entry.name)
            asked = arrival.entries[place]
            # A load that was begun for another generation may have read what was not asked for.
            if asked.generation == wanted.generation or asked.stamp == entry.stamp:
                self._exchange(arrival, place, entry)
            try:
                self._wait_or_schedule(arrival)
            except LoRASwarmError as problem:
                self._release(arrival)
                events.append(_error_event(arrival.request.request_id, ErrorInfo.of(problem)))
        return events

    def on_failed(self, entry: Entry, error: ErrorInfo) -> list[SequenceEvent]:
        """It could not be brought; returns the ends of the requests that need it."""
        events = []
        for arrival in self._arrivals.waiting_for(entry):
            self._arrivals.remove(arrival.request.request_id)
            self._release(arrival)
            events.append(_error_event(arrival.request.request_id, error))
        if entry.info is not None:
            events += self._scheduler.fail_waiting(entry.key, error)
        return events

    def note_ends(self, events: Iterable[SequenceEvent]) -> None:
        """Requests with a terminal event use nothing any more."""
        for event in (event for event in events if event.finish_reason is not None):
            for key in self._used.pop(event.request_id, ()):
                self._residency.end_use(key)

    def _wait_or_schedule(self, arrival: Arrival) -> None:
        """Queue the sequence of an arrival, or bring what it still lacks, or lacks again."""
        errors = [error for entry in arrival.entries if (error := self._residency.bring(entry))]
        if errors:
            raise ReportedError(errors[0])
        if all(map(self._residency.is_within_reach, arrival.entries)):
            self._schedule(arrival)
        else:
            self._arrivals.add(arrival)

    def _use(self, arrival: Arrival, entry: Entry) -> None:
        """Keep what the arrival needs where it is, as far as it is known what that is."""
        if entry.info is not None:
            self._residency.begin_use(entry)
            self._residency.hold(entry.key)
            self._residency.touch(entry.key)
            self._used[arrival.request.request_id].append(entry.key)

    def _exchange(self, arrival: Arrival, place: int, entry: Entry) -> None:
        """Put what has come in the place of what was wanted."""
        wanted = arrival.entries[place]
        arrival.entries[place] = entry
        self._use(arrival, entry)
        if wanted.info is not None:
            self._used[arrival.request.request_id].remove(wanted.key)
            self._residency.release(wanted.key)
            self._residency.end_use(wanted.key)

    def _release(self, arrival: Arrival) -> None:
        """The scheduler holds what the arrival has held, or nobody needs it any more."""
        for entry in arrival.entries:
            if entry.info is not None:
                self._residency.release(entry.key)

    def _schedule(self, arrival: Arrival) -> None:
        """Queue the sequence of an arrival whose adapters are all known.

        Raises   InvalidRequest if it can never be served with them.
        """
        sequence, infos = self._sequences.make(arrival)
        self._scheduler.add(sequence, infos)
        self._release(arrival)


def _replaced(name: str) -> ErrorInfo:
    message = (
        f"adapter {name!r} was replaced while this request was held up in the middle of its answer"
        " and the old content is not in memory any more; send it again"
    )
    return ErrorInfo(message, StoreError.error_type, StoreError.http_status)


def _error_event(request_id: str, error: ErrorInfo) -> SequenceEvent:
    return SequenceEvent(request_id=request_id, finish_reason="error", error=error)
