"""Takes pages and parts of pages for adapters and shared matrices. No torch.

A holder is an adapter or a shared matrix, by a name of its own. Knows neither which of them are
pinned nor what the pages hold. Called by AdapterCache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loraswarm.memory.packing import Packing
from loraswarm.memory.page_pool import Owner, PagePool
from loraswarm.memory.shelves import Shelves


class AdapterPages:
    """The pages of holders: whole ones, each its holder's alone, and shelves, which they share.

    pool owners   adapter sql@3f..    | page | page |          whole pages
                  adapter shared 9a.. | page |                 whole pages
                  adapter shelf 4     | page |                 extents of both
    """

    def __init__(self, pool: PagePool, page_elements: int) -> None:
        self._pool = pool
        self._page_elements = page_elements
        self._shelves = Shelves(page_elements)
        self._shelf_owners: dict[int, Owner] = {}
        self._next_shelf = 0
        self._max_pages: dict[str, int] = {}

    def take(self, wanted: Mapping[str, Packing]) -> dict[str, tuple[int, ...]]:
        """Room for new holders, all or none: where each piece of their packings begins.

        Units    elements of the pool.
        Raises   OutOfPages: nothing changed.
        """
        plan = self._shelves.plan({holder: packing.bins for holder, packing in wanted.items()})
        num_whole = sum(packing.num_pages for packing in wanted.values())
        self._pool.require(num_whole + plan.num_new_pages)
        new_pages = [self._take_shelf() for _ in range(plan.num_new_pages)]
        self._shelves.commit(plan, new_pages)
        starts = {}
        for holder, packing in wanted.items():
            pages = self._pool.allocate(packing.num_pages, _owner(holder))
            pieces = [page * self._page_elements for page in pages]
            for page, begin, _ in self._shelves.extents_of(holder):
                pieces.append(page * self._page_elements + begin)
            starts[holder] = tuple(pieces)
            self._max_pages[holder] = packing.max_pages
        return starts

    def free(self, holder: str) -> None:
        """Give back what the holder has; a shelf goes back to the pool when it is empty."""
        del self._max_pages[holder]
        self._pool.free(_owner(holder))
        for page in self._shelves.release(holder):
            self._pool.free(self._shelf_owners.pop(page))

    def num_held(self, holders: Iterable[str]) -> int:
        """Pages that any of these has, or has a part of."""
        num_whole = 0
        shared: set[int] = set()
        for holder in holders:
            num_whole += len(self._pool.pages_of(_owner(holder)))
            shared.update(extent.page for extent in self._shelves.extents_of(holder))
        return num_whole + len(shared)

    def check(self, holders: Iterable[str]) -> None:
        """Assert that these holders and no others have pages, none more than its packing says, and
        no place two of them."""
        holders = list(holders)
        assert set(holders) == self._max_pages.keys()
        for holder, most in self._max_pages.items():
            assert self.num_held([holder]) <= most, f"{holder} has a part in more than {most} pages"
        self._shelves.check(holders)
        assert self._shelves.pages == self._shelf_owners.keys()
        for page, owner in self._shelf_owners.items():
            assert self._pool.pages_of(owner) == [page], f"{owner.name} is not page {page}"
        held, owned = self.num_held(holders), self._pool.num_owned("adapter")
        assert held == owned, f"{owned} pages of adapters, {held} of those that are resident"

    def _take_shelf(self) -> int:
        """A new page, with an owner of its own so that it goes back alone."""
        owner = Owner("adapter", f"shelf {self._next_shelf}")
        self._next_shelf += 1
        (page,) = self._pool.allocate(1, owner)
        self._shelf_owners[page] = owner
        return page


def _owner(holder: str) -> Owner:
    return Owner("adapter", holder)
