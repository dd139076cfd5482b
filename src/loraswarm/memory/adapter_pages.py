"""Takes pages and parts of pages for adapters and for the matrices they share. No torch.

A shared matrix has pages while an adapter that uses it has. Knows neither which adapters may leave
nor what the pages hold. Called by AdapterCache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from loraswarm.adapters.adapter import AdapterInfo, SharedMatrix
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.sequence import AdapterKey
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.packing import Packing
from loraswarm.memory.page_pool import Owner, PagePool
from loraswarm.memory.shelves import Shelves
from loraswarm.memory.tile_layout import (
    AdapterBytes,
    AdapterLayout,
    SharedLayout,
    adapter_bytes,
    adapter_layout,
    shared_layout,
)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SharedPlace:
    """Where a shared matrix is; a new object each time it becomes resident, gone when it leaves.

    Piece i of its packing begins at element `starts[i]` of the pool.
    """

    matrix: SharedMatrix
    layout: SharedLayout
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLoad:
    """An order to write an adapter into the pool.

    Piece i of its packing begins at element `starts[i]`. `shared` has a place for each of
    `info.shared_matrices()`: those not written there yet are to be written too, whether or not
    another load is to do so, since that load may fail.
    """

    info: AdapterInfo
    layout: AdapterLayout
    starts: tuple[int, ...]
    shared: tuple[SharedPlace, ...]


@dataclass(slots=True)
class _Shared:
    """A resident shared matrix and the resident adapters that use it."""

    place: SharedPlace
    users: set[AdapterKey] = field(default_factory=set)


class AdapterPages:
    """The pages of holders (an adapter or a shared matrix): whole ones, each its holder's alone,
    and shelves, which they share.

    pool owners   adapter sql@3f..    | page | page |          whole pages
                  adapter shared 9a.. | page |                 whole pages
                  adapter shelf 4     | page |                 extents of both
    """

    def __init__(self, pool: PagePool, shape: BaseShape, geometry: PageGeometry) -> None:
        self._pool = pool
        self._shape = shape
        self._geometry = geometry
        self._shelves = Shelves(geometry.page_elements)
        self._shelf_owners: dict[int, Owner] = {}
        self._next_shelf = 0
        self._max_pages: dict[str, int] = {}
        self._matrices: dict[AdapterKey, tuple[SharedMatrix, ...]] = {}
        self._shared: dict[SharedMatrix, _Shared] = {}

    def num_bytes(self, info: AdapterInfo) -> AdapterBytes:
        """Bytes the adapter takes: its own, and of matrices it may share."""
        return adapter_bytes(info, self._shape, self._geometry)

    def most_pages(self, info: AdapterInfo, beside: Iterable[AdapterKey] = ()) -> int:
        """The most pages the adapter has a part in, without matrices that those `beside` share."""
        present = self._matrices_of(beside)
        packings = self._packings(info, present)
        return sum(packing.max_pages for packing in packings.values())

    def least_pages(self, info: AdapterInfo) -> int:
        """Pages that taking it needs now even if all the rest goes into gaps of shared pages."""
        return sum(packing.num_pages for packing in self._packings(info, self._shared).values())

    def take(self, info: AdapterInfo) -> AdapterLoad:
        """Places for an adapter and for those of its matrices that have none, all or nothing.

        Raises   OutOfPages: nothing changed.
        """
        key, matrices = info.key, info.shared_matrices()
        starts = self._take(self._packings(info, self._shared))
        for matrix in matrices:
            if matrix not in self._shared:
                place = SharedPlace(
                    matrix, self._shared_layout(matrix), starts[_shared_holder(matrix)]
                )
                self._shared[matrix] = _Shared(place)
            self._shared[matrix].users.add(key)
        self._matrices[key] = matrices
        places = tuple(self._shared[matrix].place for matrix in matrices)
        return AdapterLoad(info, self._layout(info), starts[_holder(key)], places)

    def free(self, key: AdapterKey) -> None:
        """Give back the adapter's pages, and those of matrices that it was the last to use."""
        self._free(_holder(key))
        for matrix in self._matrices.pop(key):
            shared = self._shared[matrix]
            shared.users.remove(key)
            if not shared.users:
                self._free(_shared_holder(matrix))
                del self._shared[matrix]

    def num_held(self, keys: Collection[AdapterKey]) -> int:
        """Pages that any of these adapters, or a matrix that they use, has or has a part of."""
        holders = [_holder(key) for key in keys]
        holders += [_shared_holder(matrix) for matrix in self._matrices_of(keys)]
        return self._num_held(holders)

    def check(self, keys: Collection[AdapterKey]) -> None:
        """Assert that these adapters, the matrices they use and no others have pages, none more
        than its packing says, and no place two of them."""
        assert self._matrices.keys() == set(keys)
        users: dict[SharedMatrix, set[AdapterKey]] = {}
        for key, matrices in self._matrices.items():
            for matrix in matrices:
                users.setdefault(matrix, set()).add(key)
        assert users == {matrix: shared.users for matrix, shared in self._shared.items()}
        holders = {_holder(key) for key in keys} | {_shared_holder(matrix) for matrix in users}
        assert holders == self._max_pages.keys()
        for holder, most in self._max_pages.items():
            num_held = self._num_held([holder])
            assert num_held <= most, f"{holder} has a part in more than {most} pages"
        self._shelves.check(holders)
        assert self._shelves.pages == self._shelf_owners.keys()
        for page, owner in self._shelf_owners.items():
            assert self._pool.pages_of(owner) == [page], f"{owner.name} is not page {page}"
        held, owned = self._num_held(holders), self._pool.num_owned("adapter")
        assert held == owned, f"{owned} pages of adapters, {held} of those that are resident"

    def _packings(self, info: AdapterInfo, present: Collection[SharedMatrix]) -> dict[str, Packing]:
        """Of the adapter and of the matrices it uses that are not `present`, by holder."""
        packings = {
            _shared_holder(matrix): self._shared_layout(matrix).packing
            for matrix in info.shared_matrices()
            if matrix not in present
        }
        packings[_holder(info.key)] = self._layout(info).packing
        return packings

    def _matrices_of(self, keys: Iterable[AdapterKey]) -> set[SharedMatrix]:
        return {matrix for key in keys for matrix in self._matrices[key]}

    def _take(self, wanted: dict[str, Packing]) -> dict[str, tuple[int, ...]]:
        """Room for new holders, all or none: where each piece of their packings begins.

        Units    elements of the pool.
        """
        plan = self._shelves.plan({holder: packing.bins for holder, packing in wanted.items()})
        num_whole = sum(packing.num_pages for packing in wanted.values())
        self._pool.require(num_whole + plan.num_new_pages)
        new_pages = [self._take_shelf() for _ in range(plan.num_new_pages)]
        self._shelves.commit(plan, new_pages)
        page_elements = self._geometry.page_elements
        starts = {}
        for holder, packing in wanted.items():
            pages = self._pool.allocate(packing.num_pages, _owner(holder))
            pieces = [page * page_elements for page in pages]
            for page, begin, _ in self._shelves.extents_of(holder):
                pieces.append(page * page_elements + begin)
            starts[holder] = tuple(pieces)
            self._max_pages[holder] = packing.max_pages
        return starts

    def _free(self, holder: str) -> None:
        """Give back what the holder has; a shelf goes back to the pool when it is empty."""
        del self._max_pages[holder]
        self._pool.free(_owner(holder))
        for page in self._shelves.release(holder):
            self._pool.free(self._shelf_owners.pop(page))

    def _num_held(self, holders: Iterable[str]) -> int:
        num_whole = 0
        shared: set[int] = set()
        for holder in holders:
            num_whole += len(self._pool.pages_of(_owner(holder)))
            shared.update(extent.page for extent in self._shelves.extents_of(holder))
        return num_whole + len(shared)

    def _take_shelf(self) -> int:
        """A new page, with an owner of its own so that it goes back alone."""
        owner = Owner("adapter", f"shelf {self._next_shelf}")
        self._next_shelf += 1
        (page,) = self._pool.allocate(1, owner)
        self._shelf_owners[page] = owner
        return page

    def _layout(self, info: AdapterInfo) -> AdapterLayout:
        return adapter_layout(info, self._shape, self._geometry)

    def _shared_layout(self, matrix: SharedMatrix) -> SharedLayout:
        return shared_layout(matrix.num_rows, matrix.width, self._shape, self._geometry)


def _owner(holder: str) -> Owner:
    return Owner("adapter", holder)


def _holder(key: AdapterKey) -> str:
    return "@".join(key)


def _shared_holder(matrix: SharedMatrix) -> str:
    return f"shared {matrix.digest} {matrix.num_rows}x{matrix.width}"
