"""What an operator is told about each adapter: where it is, who uses it, how often it was there.

Owns the counts of requests by adapter; reads everything else from its owners. Used by the engine
and engine/administration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loraswarm.adapters.catalog import Catalog, Entry
from loraswarm.core.admin import AdapterState, Tier
from loraswarm.core.client import AdapterSummary
from loraswarm.engine.arrivals import Arrivals
from loraswarm.engine.residency import Residency
from loraswarm.engine.scheduler import Scheduler
from loraswarm.memory.memory import Memory


@dataclass(slots=True)
class _Requests:
    """Requests for one adapter, by where it was when they came."""

    device: int = 0
    host: int = 0
    store: int = 0


NO_REQUESTS = _Requests()


class AdapterStates:
    """Rows of `GET /v1/adapters`, and the totals of hits and misses."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        memory: Memory,
        scheduler: Scheduler,
        arrivals: Arrivals,
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._memory = memory
        self._scheduler = scheduler
        self.arrivals = arrivals
        self._requests: dict[str, _Requests] = {}
        self.pinned_names: Callable[[], frozenset[str]] = frozenset
        self.totals: Counter[Tier] = Counter()

    def count(self, entries: Iterable[Entry]) -> None:
        """A request has come for these."""
        for entry in entries:
            tier = self._residency.tier_of(entry.key if entry.info else None)
            counts = self._requests.setdefault(entry.name, _Requests())
            setattr(counts, tier, getattr(counts, tier) + 1)
            self.totals[tier] += 1

    def forget(self, names: Iterable[str]) -> None:
        """Adapters that the catalog knows no more."""
        for name in names:
            self._requests.pop(name, None)

    def of(self, name: str) -> AdapterState:
        """One adapter. Raises UnknownAdapter."""
        return self._row(self._catalog.summary(name), self._in_flight())

    def all(self) -> tuple[AdapterState, ...]:
        """Every adapter of the catalog, sorted by name."""
        in_flight = self._in_flight()
        return tuple(self._row(row, in_flight) for row in self._catalog.summaries())

    def waiting_names(self) -> set[str]:
        """Adapters of requests that have not started."""
        names = {entry.name for arrival in self.arrivals for entry in arrival.entries}
        return names | set(self._scheduler.adapters_in_use()[1])

    def is_used(self, entry: Entry) -> bool:
        """Whether a request waits for this content, or any content of its name that is served no
        more is used or in memory. The entry need not be described."""
        if self.arrivals.waiting_for(entry):
            return True
        keys = self._residency.keys_of(entry.name)
        return any(not self._catalog.is_current(key) for key in keys)

    def largest_need(self) -> int:
        """Pages of the sequence that needs the most."""
        return self._scheduler.needs()

    def _in_flight(self) -> tuple[Counter[str], Counter[str]]:
        """Running and waiting requests by adapter."""
        running, waiting = self._scheduler.adapters_in_use()
        waiting.update(entry.name for arrival in self.arrivals for entry in arrival.entries)
        return running, waiting

    def _row(
        self, summary: AdapterSummary, in_flight: tuple[Counter[str], Counter[str]]
    ) -> AdapterState:
        """Built in one go: thousands of rows are asked for at a time, between two steps."""
        name = summary.name
        counts = self._requests.get(name, NO_REQUESTS)
        running, waiting = in_flight
        state, reason = self._catalog.state_of(name)
        entry = self._catalog.entry_named(name)
        error = None if entry is None else self._residency.last_error(entry)
        key = None if entry is None or entry.info is None else entry.key
        tier = self._residency.tier_of(key)
        device_bytes = 0
        if tier == "device" and entry is not None and entry.info is not None:
            device_bytes = self._memory.adapters.num_bytes(entry.info).own
        return AdapterState(
            name=name,
            path=summary.path,
            state=state,
            reason=reason,
            generation=summary.generation,
            digest=summary.digest,
            method=summary.method,
            max_rank=summary.max_rank,
            file_format=summary.file_format,
            num_bytes=summary.num_bytes,
            tier=tier,
            host_bytes=0 if key is None else self._residency.host_bytes(key),
            device_bytes=device_bytes,
            is_loading=entry is not None and self._residency.is_loading(entry),
            is_pinned=name in self.pinned_names(),
            num_running=running[name],
            num_waiting=waiting[name],
            num_requests=counts.device + counts.host + counts.store,
            num_device_hits=counts.device,
            num_host_hits=counts.host,
            num_misses=counts.store,
            last_error=None if error is None else error.message,
        )
