"""Adapters that are merged, or are to be: brought into pages and pinned there.

Tokens that do not have the merged adapter subtract it, so it must be in pages. Counts as one user
of each adapter, as a request does. Knows no weights. Called by engine/merging.
"""

from __future__ import annotations

from collections.abc import Callable

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.catalog import Catalog, Entry
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.residency import Residency
from loraswarm.memory.memory import Memory


class MergeHolds:
    """Pins of the adapters that a Merger works with."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        memory: Memory,
        largest_need: Callable[[], int],
    ) -> None:
        """`largest_need` are the pages of the sequence that needs the most, its adapters included;
        `num_taken_pages`, which may be set later, those that operators have pinned."""
        self._catalog = catalog
        self._residency = residency
        self._memory = memory
        self._largest_need = largest_need
        self.num_taken_pages: Callable[[], int] = lambda: 0
        self._held: dict[AdapterKey, AdapterInfo] = {}
        self.problem: str | None = None
        """Why what was asked for last is not held yet; None while it is on its way, or held."""

    @property
    def keys(self) -> tuple[AdapterKey, ...]:
        """Adapters that are pinned, in pages or on their way there."""
        return tuple(self._held)

    def key_of(self, name: str) -> AdapterKey | None:
        """The content that `name` stands for; None if it is not served, or is being read first."""
        entry = self._catalog.entry_named(name)
        if entry is None:
            self.problem = f"adapter {name!r} is not served"
            return None
        if entry.info is None:
            self._bring(entry)
            return None
        return entry.key

    def is_current(self, key: AdapterKey) -> bool:
        """Whether new requests get this content."""
        return self._catalog.is_current(key)

    def info_of(self, key: AdapterKey) -> AdapterInfo | None:
        """Its description, if new requests get this content and it has been read."""
        entry = self._catalog.entry_of(key)
        return None if entry is None else entry.info

    def try_hold(self, key: AdapterKey) -> bool:
        """Whether the adapter is in pages and pinned; if not, it is on its way, or `problem` says
        why not yet. To be asked again."""
        if key not in self._held and not self._try_pin(key):
            return False
        adapters = self._memory.adapters
        if adapters.has_failed(key):
            self.release(key)
            self.problem = f"adapter {key[0]!r} could not be copied into pages"
            return False
        self.problem = None
        return adapters.is_ready(key)

    def release(self, key: AdapterKey) -> None:
        """Take back the pin; no weight in use may have the adapter in it. No-op if not held."""
        if self._held.pop(key, None) is not None:
            self._memory.adapters.unpin(key, was_used=False)
            self._residency.end_use(key)

    def _try_pin(self, key: AdapterKey) -> bool:
        entry = self._catalog.entry_of(key)
        if entry is None:
            self.problem = f"adapter {key[0]!r} is not served in this generation"
            return False
        if entry.info is None or not self._residency.is_within_reach(entry):
            self._bring(entry)
            return False
        if not self._has_room(entry.info):
            num_pages = self._memory.adapters.num_pages(entry.info)
            self.problem = (
                f"adapter {key[0]!r} takes {num_pages:,} pages, which are not to be had beside what"
                " runs (--pool-bytes)"
            )
            return False
        load, _ = self._memory.pin_adapter(entry.info)
        self._residency.begin_use(entry)
        self._held[key] = entry.info
        if load is not None:
            self._residency.start_copies([load])
        return True

    def _bring(self, entry: Entry) -> None:
        error = self._residency.bring(entry) or self._residency.last_error(entry)
        self.problem = None if error is None else error.message

    def _has_room(self, info: AdapterInfo) -> bool:
        """Whether it has pages already or may take them: all that runs must still fit beside it,
        with what is held already."""
        adapters = self._memory.adapters
        infos = [*self._held.values(), info]
        num_held = sum(adapters.num_pages(one) for one in infos) + self.num_taken_pages()
        if num_held + self._largest_need() > self._memory.pool.num_pages:
            return False
        is_there = adapters.is_resident(info.key)
        return is_there or self._memory.has_room(adapters.num_load_pages(info))
