"""The index side of one page pool and the two caches that share it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from loraswarm.core.base_shape import BaseShape
from loraswarm.memory.adapter_cache import AdapterCache
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.kv_cache import KVCache
from loraswarm.memory.page_pool import PagePool


@dataclass(frozen=True, slots=True)
class Memory:
    """One pool; K/V of sequences and tiles of adapters take their pages from it."""

    pool: PagePool
    kv_cache: KVCache
    adapters: AdapterCache

    @classmethod
    def of_pages(cls, num_pages: int, shape: BaseShape, geometry: PageGeometry) -> Memory:
        """An empty pool of `num_pages` pages and its caches."""
        pool = PagePool(num_pages, geometry.page_bytes)
        return cls(pool, KVCache(pool, geometry), AdapterCache(pool, shape, geometry))
