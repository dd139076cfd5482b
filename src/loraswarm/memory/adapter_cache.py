"""Which adapters are resident in pages, which are pinned, and which leaves first. No torch.

An adapter is pinned once per sequence that uses it; idle ones stay until their pages are wanted.
The bytes are written by TileStore; this class only says where. Called by the scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.sequence import AdapterKey
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.page_pool import Owner, PagePool
from loraswarm.memory.tile_layout import TileLayout, tile_layout


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """An order to write an adapter's tiles into `pages` before the step runs."""

    info: AdapterInfo
    pages: tuple[int, ...]
    layout: TileLayout


class AdapterCache:
    """Adapters in the pool: pinned while a sequence uses them, else evicted least recently used."""

    def __init__(self, pool: PagePool, shape: BaseShape, geometry: PageGeometry) -> None:
        self._pool = pool
        self._shape = shape
        self._geometry = geometry
        self._pins: dict[AdapterKey, int] = {}
        self._idle: OrderedDict[AdapterKey, None] = OrderedDict()

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    @property
    def num_resident(self) -> int:
        return len(self._pins) + len(self._idle)

    def is_resident(self, key: AdapterKey) -> bool:
        return key in self._pins or key in self._idle

    def num_pages(self, info: AdapterInfo) -> int:
        """Pages the adapter takes when resident."""
        return self._layout(info).num_pages

    def num_idle_pages(self) -> int:
        """Pages that eviction of every idle adapter would free."""
        return sum(len(self._pool.pages_of(_owner(key))) for key in self._idle)

    def pin(self, info: AdapterInfo) -> AdapterLoad | None:
        """Pin for one sequence; returns the load to run first if the adapter was not resident.

        Raises   OutOfPages: nothing changed, so the caller can evict and retry.
        """
        key = info.key
        if self.is_resident(key):
            self._idle.pop(key, None)
            self._pins[key] = self._pins.get(key, 0) + 1
            return None
        layout = self._layout(info)
        pages = self._pool.allocate(layout.num_pages, _owner(key))
        self._pins[key] = 1
        return AdapterLoad(info, tuple(pages), layout)

    def unpin(self, key: AdapterKey) -> None:
        """Take back one pin; with the last one the adapter becomes idle, most recently used."""
        assert self._pins.get(key, 0) > 0, f"unpin of an adapter that is not pinned: {key}"
        self._pins[key] -= 1
        if self._pins[key] == 0:
            del self._pins[key]
            self._idle[key] = None

    def evict_idle(self, num_free: int) -> list[AdapterKey]:
        """Evict idle adapters, least recently used first, until `num_free` pages are free or none
        is left to evict. Returns those evicted."""
        evicted: list[AdapterKey] = []
        while self._pool.num_free < num_free and self._idle:
            key, _ = self._idle.popitem(last=False)
            self._pool.free(_owner(key))
            evicted.append(key)
        return evicted

    def discard(self, key: AdapterKey) -> None:
        """Forget an idle adapter whose bytes were never written (its load failed)."""
        assert key not in self._pins, f"discard of a pinned adapter: {key}"
        if key in self._idle:
            del self._idle[key]
            self._pool.free(_owner(key))

    def check(self) -> None:
        """Assert that pins are positive, and that resident adapters and only they own pages."""
        assert all(count > 0 for count in self._pins.values())
        assert not self._pins.keys() & self._idle.keys()
        held = sum(len(self._pool.pages_of(_owner(key))) for key in [*self._pins, *self._idle])
        assert held == self._pool.num_owned("adapter"), "pages of an adapter that is not resident"

    def _layout(self, info: AdapterInfo) -> TileLayout:
        site_ranks = tuple((module.site, module.rank) for module in info.modules)
        return tile_layout(site_ranks, self._shape, self._geometry)


def _owner(key: AdapterKey) -> Owner:
    return Owner("adapter", "@".join(key))
