"""The loop: take what has come, plan a step, start copies, run the model, draw tokens, commit.

Accepts and aborts requests, resolves adapter names, and turns everything that happens into events.
Built by engine/setup; driven by LLM in this process or by engine/child in its own.
"""

from __future__ import annotations

import math
import random
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from loraswarm.adapters.catalog import Catalog
from loraswarm.core.admin import AdapterState, AdminCommand, ScanReport
from loraswarm.core.client import AdapterSummary, EngineInfo, EngineStats
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.administration import Administration, Answer
from loraswarm.engine.arrivals import Arrivals
from loraswarm.engine.loader import Loader
from loraswarm.engine.look_ahead import LookAhead
from loraswarm.engine.merge_control import MergeControl, MergeFacts
from loraswarm.engine.merging import Merger
from loraswarm.engine.model_runner import ModelRunner
from loraswarm.engine.policies.merging import MergePolicy
from loraswarm.engine.reception import Reception
from loraswarm.engine.reports import ResidencyReports
from loraswarm.engine.residency import Residency
from loraswarm.engine.scheduler import Scheduler
from loraswarm.engine.sequence_maker import SequenceMaker
from loraswarm.engine.states import AdapterStates
from loraswarm.engine.step import Step
from loraswarm.engine.upkeep import Upkeep
from loraswarm.engine.wakeup import Wakeup, wait_readable
from loraswarm.errors import EngineError, StoreError
from loraswarm.memory.host_cache import HostCache
from loraswarm.memory.memory import Memory
from loraswarm.memory.page_copier import PageCopier
from loraswarm.models.decoder import Decoder

MIN_TIMED_TOKENS = 64
COMMAND_POLL_S = 0.05
MERGE_SHARE = 0.1
"""Of a step's time, what merging may take before the next."""
SMOOTHING_SHARE = 0.2


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
    store_failures: tuple[str, ...] = ()
    merger: Merger | None = None

    def close(self) -> None:
        """End every thread and process, and give back the memory of merged weights."""
        if self.merger is not None:
            self.merger.close()
        self.loader.close()
        self.copier.close()
        self.wakeup.close()


class Engine:
    """One base model, one page pool, any number of adapters; one thread drives it.

    A request whose adapters are neither in pages nor in host memory waits among the arrivals; then
    it is a sequence of the scheduler's. Where there is a `merger`, `merge_policy` is asked before
    each step which adapter the weights shall have in them (None: none); without a policy, whoever
    has the merger decides.
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
        self._look_ahead = LookAhead(
            parts.runner, parts.scheduler, parts.memory.kv_cache, parts.runner.is_beside_host
        )
        self._arrivals = Arrivals()
        self._is_blocked = False
        self._states = AdapterStates(
            parts.catalog, parts.residency, parts.memory, parts.scheduler, self._arrivals
        )
        self.reports = ResidencyReports(parts.catalog, parts.residency, parts.memory, parts.host)
        self._administration = Administration(
            parts.catalog, parts.residency, parts.memory, parts.loader, self._states
        )
        self.merger = parts.merger
        self.merge_policy: Callable[[], AdapterKey | None] | None = None
        self._merge_control: MergeControl | None = None
        self._step_s = 0.0
        parts.residency.may_overrun = lambda: parts.scheduler.num_waiting == 0
        self._states.pinned_names = self._administration.pinned_names
        administration = self._administration
        if self.merger is not None:
            self.merger.holds.num_taken_pages = lambda: administration.num_pinned_pages
        sequences = SequenceMaker(info, parts.scheduler, lambda: administration.num_pinned_pages)
        self._reception = Reception(
            parts.catalog,
            parts.residency,
            parts.scheduler,
            sequences,
            self._states,
            random.Random(seed),
        )
        self._closing = weakref.finalize(self, parts.close)
        self._upkeep = Upkeep(
            parts.catalog, parts.loader, parts.residency.next_job_id, refresh_interval_s
        )
        self._upkeep.note_failures(parts.store_failures)
        self._upkeep.tick()

    @property
    def decoder(self) -> Decoder:
        """The base, for whoever measures what its products cost; not to be changed."""
        return self._runner.decoder

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
        """When a step is due whatever happens, by time.monotonic; None: never.

        Commands may wait for what another step has ended, so they are looked at now and then.
        """
        due_s = self._upkeep.next_due_s()
        if not self._administration.is_busy:
            return due_s
        soon_s = time.monotonic() + COMMAND_POLL_S
        return soon_s if due_s is None else min(due_s, soon_s)

    def add(self, request: Request) -> None:
        """Queue a request; the load of an adapter that is not at hand begins now.

        Raises   InvalidRequest, UnknownAdapter, AdapterError, Overloaded or StoreError at once if
                 it is known that it cannot be served; nothing else is touched. What is only
                 found when the adapter is read comes as an event.
        """
        self._require_open()
        self._reception.receive(request)

    def abort(self, request_id: str) -> SequenceEvent | None:
        """End a request; returns its terminal event, or None if it has already ended."""
        event = self._reception.abort(request_id) or self._scheduler.abort(request_id)
        self._look_ahead.drop_void()
        self._reception.note_ends([event] if event else [])
        return event

    def abort_all(self) -> list[SequenceEvent]:
        """End every request."""
        open_ids = self._reception.open_ids
        return [event for name in open_ids if (event := self.abort(name))]

    def step(self, may_wait: bool = True) -> list[SequenceEvent]:
        """Advance every scheduled request by one chunk or token; returns what happened.

        If nothing can run because adapters are on their way, it waits for news, unless told not to.
        """
        self._require_open()
        events = self._collect()
        step = self._look_ahead.step
        if step is None:
            only = self._merge(MERGE_SHARE * self._step_s)
            step = self._plan(only)
        self._residency.start_copies(step.loads)
        if step.chunks:
            events += self._run(step)
        else:
            self._residency.unblock()
            assert self._may_go_on(), "work is waiting but nothing can run"
        self._is_blocked = not step.chunks and not self._residency.has_lost
        if self._is_blocked and may_wait and not events and self.has_work:
            self.wait()
        self._reception.note_ends(events)
        if events and self._administration.is_busy:
            self._parts.wakeup.wake()  # commands may wait for what has just ended
        return events

    def require_adapter(self, name: str) -> None:
        """Raise UnknownAdapter, AdapterError or Overloaded unless requests may ask for `name`."""
        self._catalog.resolve(name)

    def merge_by(self, policy: MergePolicy, facts: MergeFacts) -> None:
        """From now on merge what a policy wants; there must be a merger."""
        assert self.merger is not None
        self._merge_control = MergeControl(policy, self.merger, self._scheduler, facts)

    def merge_now(self) -> str | None:
        """Merge what `merge_policy` wants, as far as memory goes, before any request is served.

        Returns why it cannot be, None if it is done.
        """
        assert self.merger is not None
        assert not self.has_work
        while True:
            self._collect()
            self._merge(math.inf)
            if self.merger.target is not None and self.merger.is_settled:
                return None
            if self.merger.holds.problem is not None:
                return self.merger.holds.problem
            self.wait(COMMAND_POLL_S)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until there is news, the next thing is due, or so many seconds have passed."""
        due_s = self.next_due_s()
        waits = [timeout_s] if timeout_s is not None else []
        if due_s is not None:
            waits.append(max(0.0, due_s - time.monotonic()))
        wait_readable(self.filenos(), min(waits, default=None))

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
        self.reports.note_names((*changed, *removed))
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
            total_unkept_images=self._residency.num_unkept_images,
            total_device_evictions=memory.adapters.total_evictions,
            total_host_evictions=host.total_evictions,
            total_prefix_evictions=memory.prefixes.total_evicted_pages,
            total_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            total_prefix_asked_tokens=scheduler.num_prefix_asked_tokens,
            loads=dict(self._residency.loads),
            running_adapters=tuple(sorted(running)),
            waiting_adapters=tuple(sorted(self._states.waiting_names())),
            merging=None if self.merger is None else self.merger.state,
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

    def _merge(self, budget_s: float) -> frozenset[str] | None:
        """Go on with merging for about so long; who alone may compute next (None: all)."""
        if self._merge_control is not None:
            return self._merge_control.advance(budget_s)
        if self.merger is not None:
            if self.merge_policy is not None:
                self.merger.set_target(self.merge_policy())
            self.merger.advance(budget_s)
        return None

    def _plan(self, only: frozenset[str] | None) -> Step:
        """The next step. What is merged gives its pages back if nothing can run beside it."""
        step = self._scheduler.plan(only)
        self._runner.forget(step.dropped)
        is_stuck = self.has_work and not step.chunks and not step.loads and not self._may_go_on()
        if is_stuck and self.merger is not None and self.merger.give_way():
            step = self._scheduler.plan()
            self._runner.forget(step.dropped)
        return step

    def _run(self, step: Step) -> list[SequenceEvent]:
        results, seconds = self._look_ahead.run(step, self._may_look_ahead())
        self._memory.costs.saw_step(seconds)
        self._step_s += (SMOOTHING_SHARE if self._step_s else 1.0) * (seconds - self._step_s)
        if step.num_tokens >= MIN_TIMED_TOKENS:
            self._memory.costs.saw_prefill(step.num_tokens, seconds)
        if self._merge_control is not None:
            self._merge_control.saw_step(step, seconds)
        events = self._scheduler.commit(step, results)
        self._look_ahead.drop_void()
        return events

    def _may_look_ahead(self) -> bool:
        """Whether weights and adapters stay as they are until the next step."""
        has_policy = self.merge_policy is not None or self._merge_control is not None
        is_merging = has_policy or (self.merger is not None and not self.merger.is_settled)
        return not is_merging and not self._administration.is_busy

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
        arrived = [
            (one.wanted, self._catalog.learned(one.wanted, one.info, one.stamp))
            for one in news.arrived
        ]
        for wanted, entry in arrived:
            events += self._reception.on_arrived(wanted, entry)
        for entry, error in news.failed:
            events += self._reception.on_failed(entry, error)
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
