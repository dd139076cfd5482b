"""What an engine holds of adapters and prefixes, told to whoever watches: all once, then changes.

Owns what was told last. The caches note what has changed only while somebody watches; here that is
compared with what was told, at turns of the loop. Called by engine/child. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

from loraswarm.adapters.catalog import Catalog
from loraswarm.core.admin import Tier
from loraswarm.core.residency_report import ResidencyReport, join_pages
from loraswarm.core.sequence import AdapterKey
from loraswarm.memory.adapter_cache import AdapterCache
from loraswarm.memory.host_cache import HostCache
from loraswarm.memory.memory import Memory

LEAST_GAP_S = 0.02
"""Between two reports of a busy engine: each step may fill pages of prefixes."""
HeldTier = Literal["device", "host"]


class Tiers(Protocol):
    """Who knows where an adapter is."""

    def tier_of(self, key: AdapterKey | None) -> Tier: ...


class ResidencyReports:
    """Reports of one engine, numbered from 0; its epoch is when it was made.

    An adapter is told by its name with the tier of the content that new requests for the name get;
    another content of that name that is still in memory is not told.
    """

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        memory: Memory,
        host: HostCache,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._tiers = tiers
        self._adapters: AdapterCache = memory.adapters
        self._prefixes = memory.prefixes
        self._host = host
        self._clock = clock
        self._epoch = time.time_ns()
        self._number = 0
        self._told: dict[str, HeldTier] = {}
        self._names: set[str] = set()
        self._is_watched = False
        self._is_full_due = False
        self._last_s = 0.0

    def watch(self) -> None:
        """Report from now on, all that is held first; again, if it was watched already."""
        self._is_watched = self._is_full_due = True
        self._forget_changes()

    def note_names(self, names: Iterable[str]) -> None:
        """These stand for another content than before, or for none."""
        if self._is_watched:
            self._names.update(names)

    def take(self, is_idle: bool) -> ResidencyReport | None:
        """The next report, if there is something to tell; None if nobody watches.

        While the engine is busy it is asked again soon, and may tell more at once then.
        """
        if not self._is_watched:
            return None
        if self._is_full_due:
            return self._full()
        caches = self._adapters, self._host, self._prefixes
        if not self._names and not any(cache.touched for cache in caches):
            return None
        now_s = self._clock()
        if not is_idle and now_s - self._last_s < LEAST_GAP_S:
            return None
        self._last_s = now_s
        return self._changes()

    def _full(self) -> ResidencyReport:
        self._is_full_due = False
        self._forget_changes()
        names = {key[0] for key in (*self._adapters.keys(), *self._host.keys())}
        tiers = {name: tier for name in names if (tier := self._tier(name)) is not None}
        self._told = dict(tiers)
        return self._report(
            is_full=True, tiers=tiers, added_pages=join_pages(self._prefixes.digests())
        )

    def _changes(self) -> ResidencyReport | None:
        """None if all is again as it was told."""
        keys = (self._adapters.touched or set()) | (self._host.touched or set())
        names = self._names | {key[0] for key in keys}
        digests = self._prefixes.touched or set()
        self._forget_changes()
        tiers: dict[str, HeldTier | None] = {}
        for name in names:
            tier = self._tier(name)
            if tier == self._told.get(name):
                continue
            tiers[name] = tier
            if tier is None:
                del self._told[name]
            else:
                self._told[name] = tier
        added = {digest for digest in digests if self._prefixes.has(digest)}
        if not tiers and not digests:
            return None
        return self._report(
            tiers=tiers,
            added_pages=join_pages(added),
            removed_pages=join_pages(digests - added),
        )

    def _report(
        self,
        is_full: bool = False,
        tiers: Mapping[str, HeldTier | None] | None = None,
        added_pages: bytes = b"",
        removed_pages: bytes = b"",
    ) -> ResidencyReport:
        number = self._number
        self._number += 1
        return ResidencyReport(
            epoch=self._epoch,
            number=number,
            is_full=is_full,
            tiers=tiers or {},
            added_pages=added_pages,
            removed_pages=removed_pages,
        )

    def _forget_changes(self) -> None:
        self._names = set()
        self._adapters.touched = set()
        self._host.touched = set()
        self._prefixes.touched = set()

    def _tier(self, name: str) -> HeldTier | None:
        entry = self._catalog.entry_named(name)
        if entry is None:
            return None
        digest = self._catalog.summary(name).digest
        tier = self._tiers.tier_of((name, digest)) if digest else "store"
        return None if tier == "store" else tier
