"""The index side of one page pool and the three caches that share it. No torch.

Owns eviction: who leaves when room is wanted, adapters and cached prefixes in one order. Called by
the scheduler and the engine, in one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.config import Eviction
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.sequence import AdapterKey
from loraswarm.errors import OutOfPages
from loraswarm.memory.adapter_cache import AdapterCache, AdapterLoad
from loraswarm.memory.costs import CostModel
from loraswarm.memory.eviction import Evictable, EvictionOrder
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.kv_cache import KVCache
from loraswarm.memory.page_pool import PagePool
from loraswarm.memory.prefix_cache import PrefixCache


def _in_store_only(key: AdapterKey) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """How things leave the pool. `is_in_host` says whether an adapter that leaves the pool need
    only be copied to come back, or be read; `costs` may be shared with the host cache."""

    policy: Eviction = "cost"
    has_prefix_cache: bool = True
    clock: Callable[[], float] = time.monotonic
    is_in_host: Callable[[AdapterKey], bool] = _in_store_only
    costs: CostModel = field(default_factory=CostModel)


@dataclass(frozen=True, slots=True)
class Memory:
    """One pool; K/V of sequences, cached prefixes and tiles of adapters take their pages from it.

    What no sequence needs stays until its pages are wanted. Then the lowest of `order` leaves; a
    cached prefix never outlives the adapters that made it. Adapters that queued requests want
    (protected ones) leave when nothing else can, the one protected last first.
    Without prefix cache `prefixes` stays empty.
    """

    pool: PagePool
    kv_cache: KVCache
    prefixes: PrefixCache
    adapters: AdapterCache
    order: EvictionOrder[Evictable]
    costs: CostModel

    @classmethod
    def of_pages(
        cls,
        num_pages: int,
        shape: BaseShape,
        geometry: PageGeometry,
        options: MemoryOptions | None = None,
    ) -> Memory:
        """An empty pool of `num_pages` pages and its caches."""
        options = options or MemoryOptions()
        costs = options.costs
        pool = PagePool(num_pages, geometry.page_bytes)
        order: EvictionOrder[Evictable] = EvictionOrder(options.policy, options.clock)
        adapters = AdapterCache(pool, shape, geometry, order, costs, options.is_in_host)
        prefixes = PrefixCache(pool, geometry, order, costs, adapters)
        kv_cache = KVCache(pool, geometry, prefixes if options.has_prefix_cache else None)
        return cls(pool, kv_cache, prefixes, adapters, order, costs)

    def has_room(self, num_pages: int) -> bool:
        """Whether `num_pages` are free, or would be after evicting all that may leave."""
        missing = num_pages - self.pool.num_free - self.prefixes.num_idle_pages
        return missing <= 0 or self.adapters.num_idle_pages() >= missing

    def make_room(self, num_pages: int) -> list[AdapterKey] | None:
        """Evict, lowest first, until `num_pages` are free; returns the adapters that left.

        None, and nothing changed, if that cannot be.
        """
        if not self.has_room(num_pages):
            return None
        evicted: list[AdapterKey] = []
        while self.pool.num_free < num_pages:
            has_evicted = self._evict_one(evicted)
            assert has_evicted, "has_room promised pages that cannot be freed"
        return evicted

    def pin_adapter(self, info: AdapterInfo) -> tuple[AdapterLoad | None, list[AdapterKey]]:
        """`AdapterCache.pin`, after evicting as few, lowest first, as make it fit.

        Returns the load, if there is something to load, and the adapters that left. A gap that an
        adapter leaves in a shared page may do.
        Raises   OutOfPages if it does not fit with everything evicted that may leave. What was
                 evicted is gone: nothing, unless only shared pages were short (`take_dropped`).
        """
        least = self.adapters.least_load_pages(info)
        if not self.has_room(least):
            self.pool.require(least)
        evicted: list[AdapterKey] = []
        while self.pool.num_free < least and self._evict_one(evicted):
            pass
        while True:
            try:
                return self.adapters.pin(info), evicted
            except OutOfPages:
                if not self._evict_one(evicted):
                    raise

    def drop_adapter(self, key: AdapterKey) -> bool:
        """Free the adapter's pages and its cached prefixes, also if an operator wants it kept.

        True if that is done (or there was nothing). False if it is pinned or being written: then
        it is remembered and done as soon as it is not, and until then no prefix of it is cached.
        """
        self.adapters.drop(key)
        self.prefixes.drop_adapter(key)
        return not self.adapters.is_resident(key)

    def take_dropped(self) -> list[AdapterKey]:
        """Adapters that left their pages since last asked: evicted, dropped, or failed.

        One may be on its way back already; so ask before placing loads that are done.
        """
        return self.adapters.take_left()

    def check(self) -> None:
        """Assert conservation of pages, one owner a page, users and children counted right, and an
        order of exactly what may leave."""
        self.pool.check()
        self.kv_cache.check()
        num_offered = self.adapters.check() + self.prefixes.check()
        assert len(self.order) == num_offered, "the order has what may not leave"
        assert self.adapters.num_prefix_pages() == self.prefixes.num_pages_by_adapter()

    def _evict_one(self, evicted: list[AdapterKey]) -> bool:
        """Evict the lowest; adapters are added to `evicted`. False if nothing may leave.

        Where that is an adapter, the prefixes that it made leave first, one at a time: it takes no
        more of them along than there must be room.
        """
        item = self.order.lowest()
        if item is None:
            item = self.adapters.last_resort()
        if item is None:
            return False
        if isinstance(item, bytes):
            self.prefixes.evict(item)
            return True
        if not self.prefixes.evict_last_of(item):
            self.adapters.evict(item)
            evicted.append(item)
        return True
