"""The loop: take what has come, plan a step, start copies, run the model, draw tokens, commit.

Accepts and aborts requests, resolves adapter names, and turns everything that happens into events.
Built by engine/setup; driven by LLM in this process or by engine/child in its own.
"""

from __future__ import annotations

import random
import select
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from loraswarm.adapters.catalog import Catalog, Entry
from loraswarm.core.admin import AdapterState, AdminCommand, ScanReport
from loraswarm.core.client import AdapterSummary, EngineInfo, EngineStats
from loraswarm.core.events import ErrorInfo, ReportedError, SequenceEvent
from loraswarm.core.request import Request
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.administration import Administration, Answer
from loraswarm.engine.arrivals import Arrival, Arrivals
from loraswarm.engine.loader import Loader
from loraswarm.engine.model_runner import ModelRunner
from loraswarm.engine.residency import Residency
from loraswarm.engine.results import chunk_results
from loraswarm.engine.scheduler import Scheduler
from loraswarm.engine.sequence_maker import SequenceMaker
from loraswarm.engine.states import AdapterStates
from loraswarm.engine.step import Step
from loraswarm.engine.upkeep import Upkeep
from loraswarm.engine.wakeup import Wakeup
from loraswarm.errors import EngineError, InvalidRequest, LoRASwarmError, StoreError
from loraswarm.memory.host_cache import HostCache
from loraswarm.memory.memory import Memory
from loraswarm.memory.page_copier import PageCopier

MIN_TIMED_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is put together from; it owns and closes them."""

    catalog: Catalog
    loader: Loader
    host: HostCache
    copier: PageCopier
    wakeup: Wakeup
    runner: ModelRunner
    memory: Memory
    residency: Residency
    scheduler: Scheduler

    def close(self) -> None:
        """End every thread and process."""
        self.loader.close()
        self.copier.close()
        self.wakeup.close()


class Engine:
    """One base model, one page pool, any number of adapters; one thread drives it.

    A request whose adapters are neither in pages nor in host memory waits among the arrivals; then
    it is a sequence of the scheduler's.
    """

    def __init__(
        self,
        info: EngineInfo,
        parts: EngineParts,
        seed: int | None,
        refresh_interval_s: float | None = None,
    ) -> None:
        self.info = info
        self._parts = parts
        self._catalog = parts.catalog
        self._runner = parts.runner
        self._memory = parts.memory
        self._residency = parts.residency
        self._scheduler = parts.scheduler
        self._random = random.Random(seed)
        self._arrivals = Arrivals()
        self._used: dict[str, list[AdapterKey]] = {}
        self._num_requests = 0
        self._is_blocked = False
        self._states = AdapterStates(
            parts.catalog, parts.residency, parts.memory, parts.scheduler, self._arrivals
        )
        self._administration = Administration(
            parts.catalog, parts.residency, parts.memory, parts.loader, self._states
        )
        parts.residency.may_overrun = lambda: parts.scheduler.num_waiting == 0
        self._states.pinned_names = self._administration.pinned_names
        administration = self._administration
        self._sequences = SequenceMaker(
            info, parts.scheduler, lambda: administration.num_pinned_pages
        )
        self._closing = weakref.finalize(self, parts.close)
        self._upkeep = Upkeep(
            parts.catalog, parts.loader, parts.residency.next_job_id, refresh_interval_s
        )
        self._upkeep.tick()

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return self._scheduler.has_work or len(self._arrivals) > 0

    @property
    def is_blocked(self) -> bool:
        """Whether the last step could do nothing: there is something to do again when one of
        `filenos` is readable, or at `next_due_s`."""
        return self._is_blocked

    def filenos(self) -> tuple[int, ...]:
        """Descriptors that are readable when there is news from beside the steps."""
        return self._parts.loader.fileno(), self._parts.wakeup.fileno()

    def next_due_s(self) -> float | None:
        """When a step is due whatever happens, by time.monotonic; None: never."""
        return self._upkeep.next_due_s()

    def add(self, request: Request) -> None:
        """Queue a request; the load of an adapter that is not at hand begins now.

        Raises   InvalidRequest, UnknownAdapter, AdapterError, Overloaded or StoreError at once if
                 it is known that it cannot be served; nothing else is touched. What is only
                 found when the adapter is read comes as an event.
        """
        self._require_open()
        if request.request_id in self._used:
            raise InvalidRequest(f"request id {request.request_id!r} is already in use")
        entries = [self._catalog.resolve(name) for name, _ in request.weighted_adapters]
        self._sequences.check(request)
        self._num_requests += 1
        seed = request.params.seed
        if seed is None:
            seed = self._random.getrandbits(64)
        arrival = Arrival(request, entries, seed, self._num_requests, time.monotonic())
        sequence = None
        if all(entry.info is not None for entry in entries):
            sequence, infos = self._sequences.make(arrival)
            if not infos:
                arrival.entries = entries = []
        errors = [error for entry in entries if (error := self._residency.bring(entry))]
        if errors:
            raise ReportedError(errors[0])
        self._states.count(entries)
        self._used[request.request_id] = []
        for entry in entries:
            self._use(arrival, entry)
        if sequence is not None and all(map(self._residency.is_within_reach, entries)):
            self._schedule(arrival)
        else:
            self._arrivals.add(arrival)

    def abort(self, request_id: str) -> SequenceEvent | None:
        """End a request; returns its terminal event, or None if it has already ended."""
        arrival = self._arrivals.remove(request_id)
        if arrival is not None:
            self._release(arrival)
            event: SequenceEvent | None = SequenceEvent(
                request_id=request_id, finish_reason="abort"
            )
        else:
            event = self._scheduler.abort(request_id)
        self._note_ends([event] if event else [])
        return event

    def abort_all(self) -> list[SequenceEvent]:
        """End every request."""
        return [event for name in list(self._used) if (event := self.abort(name))]

    def step(self, may_wait: bool = True) -> list[SequenceEvent]:
        """Advance every scheduled request by one chunk or token; returns what happened.

        If nothing can run because adapters are on their way, it waits for news, unless told not to.
        """
        self._require_open()
        events = self._collect()
        step = self._scheduler.plan()
        self._runner.forget(step.dropped)
        self._residency.start_copies(step.loads)
        self._is_blocked = not step.chunks
        if step.chunks:
            events += self._run(step)
        else:
            assert self._may_go_on(), "work is waiting but nothing can run"
            if may_wait and not events and self.has_work:
                self.wait()
        self._note_ends(events)
        return events

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until there is news, the next thing is due, or so many seconds have passed."""
        due_s = self.next_due_s()
        waits = [timeout_s] if timeout_s is not None else []
        if due_s is not None:
            waits.append(max(0.0, due_s - time.monotonic()))
        select.select(self.filenos(), (), (), min(waits, default=None))

    def begin_command(self, command_id: int, command: AdminCommand) -> None:
        """Start what an operator asks for; it goes on with the steps."""
        self._require_open()
        self._administration.begin(command_id, command)

    def take_answers(self) -> list[Answer]:
        """Commands that have ended since last asked."""
        return self._administration.take_answers()

    def take_catalog_changes(self) -> tuple[dict[str, AdapterSummary], tuple[str, ...]]:
        """Rows of the catalog that are new or other than before, and names that are gone."""
        changed, removed = self._catalog.take_changes()
        self._states.forget(removed)
        return changed, removed

    def adapters(self) -> tuple[AdapterSummary, ...]:
        """The catalog: served and refused adapters, sorted by name."""
        return self._catalog.summaries()

    def adapter_states(self) -> tuple[AdapterState, ...]:
        """Every adapter of the catalog, sorted by name."""
        return self._states.all()

    def stats(self) -> EngineStats:
        """Counts of requests, pages and adapters at this moment."""
        memory, host, scheduler = self._memory, self._parts.host, self._scheduler
        totals = self._states.totals
        running, _ = scheduler.adapters_in_use()
        return EngineStats(
            num_waiting=scheduler.num_waiting + len(self._arrivals),
            num_running=scheduler.num_running,
            num_free_pages=memory.pool.num_free,
            num_kv_pages=memory.pool.num_owned("kv") + memory.prefixes.num_used_pages,
            num_prefix_pages=memory.prefixes.num_idle_pages,
            num_adapter_pages=memory.pool.num_owned("adapter"),
            num_pinned_adapters=memory.adapters.num_pinned,
            num_resident_adapters=memory.adapters.num_resident,
            num_host_adapters=host.num_images,
            num_host_bytes=host.num_bytes,
            num_loading=self._residency.num_loading,
            total_preemptions=scheduler.num_preemptions,
            total_device_hits=totals["device"],
            total_host_hits=totals["host"],
            total_misses=totals["store"],
            total_load_failures=self._residency.num_failures,
            total_device_evictions=memory.adapters.total_evictions,
            total_host_evictions=host.total_evictions,
            total_prefix_evictions=memory.prefixes.total_evicted_pages,
            total_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            total_prefix_asked_tokens=scheduler.num_prefix_asked_tokens,
            loads=dict(self._residency.loads),
            running_adapters=tuple(sorted(running)),
            waiting_adapters=tuple(sorted(self._states.waiting_names())),
        )

    def check(self) -> None:
        """Assert the invariants of pool, caches and queues (for tests and idle moments)."""
        self._scheduler.check()

    def close(self) -> None:
        """End what runs beside the steps; safe to call twice. Done by itself when the engine is
        forgotten."""
        self._closing()

    def _require_open(self) -> None:
        if not self._closing.alive:
            raise EngineError("the engine is closed")

    def _run(self, step: Step) -> list[SequenceEvent]:
        start_s = time.perf_counter()
        prepared = self._runner.prepare(step, self._memory.kv_cache)
        logits_ZV = self._runner.run(prepared)
        results = chunk_results(logits_ZV, prepared.rows)
        seconds = time.perf_counter() - start_s
        self._memory.costs.saw_step(seconds)
        if step.num_tokens >= MIN_TIMED_TOKENS:
            self._memory.costs.saw_prefill(step.num_tokens, seconds)
        return self._scheduler.commit(step, results)

    def _may_go_on(self) -> bool:
        """Whether something will happen, if there is work that cannot run now."""
        return not self.has_work or self._residency.is_busy or self._administration.is_busy

    def _collect(self) -> list[SequenceEvent]:
        """Take the news and pass them on to whom they concern."""
        self._parts.wakeup.clear()
        # First: one that commands have made leave may have been copied back already.
        self._runner.forget(self._memory.take_dropped())
        news = self._residency.take_news()
        events: list[SequenceEvent] = []
        arrived = [(o.wanted, self._catalog.learned(o.wanted, o.info)) for o in news.arrived]
        for wanted, entry in arrived:
            events += self._on_arrived(wanted, entry)
        for entry, error in news.failed:
            events += self._on_failed(entry, error)
            if error.error_type == StoreError.error_type:
                self._upkeep.look_again()
        events += self._scheduler.fail_adapters(news.uncopied)
        reports: dict[int, ScanReport] = {}
        for result in news.others:
            report = self._upkeep.take(result)
            if report is not None:
                reports[result.job_id] = report
        self._administration.proceed(news, arrived, reports)
        self._residency.let_go()
        if reports or arrived:
            self._administration.follow_catalog()
            self._residency.drop_stale()
        self._upkeep.tick()
        return events

    def _on_arrived(self, wanted: Entry, entry: Entry) -> list[SequenceEvent]:
        events: list[SequenceEvent] = []
        if wanted.info is not None and wanted.key != entry.key:
            error = _replaced(wanted.name)
            events += self._scheduler.fail_waiting(wanted.key, error)
        for arrival in self._arrivals.waiting_for(wanted):
            self._arrivals.remove(arrival.request.request_id)
            place = next(i for i, e in enumerate(arrival.entries) if e.name == entry.name)
            self._exchange(arrival, place, entry)
            try:
                self._wait_or_schedule(arrival)
            except LoRASwarmError as problem:
                self._release(arrival)
                events.append(_error_event(arrival.request.request_id, ErrorInfo.of(problem)))
        return events

    def _wait_or_schedule(self, arrival: Arrival) -> None:
        """Queue the sequence of an arrival, or bring what it still lacks, or lacks again."""
        errors = [error for entry in arrival.entries if (error := self._residency.bring(entry))]
        if errors:
            raise ReportedError(errors[0])
        if all(map(self._residency.is_within_reach, arrival.entries)):
            self._schedule(arrival)
        else:
            self._arrivals.add(arrival)

    def _on_failed(self, entry: Entry, error: ErrorInfo) -> list[SequenceEvent]:
        events = []
        for arrival in self._arrivals.waiting_for(entry):
            self._arrivals.remove(arrival.request.request_id)
            self._release(arrival)
            events.append(_error_event(arrival.request.request_id, error))
        if entry.info is not None:
            events += self._scheduler.fail_waiting(entry.key, error)
        return events

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

    def _note_ends(self, events: Iterable[SequenceEvent]) -> None:
        for event in (event for event in events if event.finish_reason is not None):
            for key in self._used.pop(event.request_id, ()):
                self._residency.end_use(key)


def _replaced(name: str) -> ErrorInfo:
    message = (
        f"adapter {name!r} was replaced while this request was held up in the middle of its answer"
        " and the old content is not in memory any more; send it again"
    )
    return ErrorInfo(message, StoreError.error_type, StoreError.http_status)


def _error_event(request_id: str, error: ErrorInfo) -> SequenceEvent:
    return SequenceEvent(request_id=request_id, finish_reason="error", error=error)
