"""Which adapters are resident in pages, which are pinned, and which leaves first. No torch.

An adapter is pinned once per sequence that uses it; idle ones stay until their pages are wanted.
A shared matrix is resident while an adapter that uses it is. The bytes are written by TileStore;
this class only says where. Called by the scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from loraswarm.adapters.adapter import AdapterInfo, SharedMatrix
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.sequence import AdapterKey
from loraswarm.errors import OutOfPages
from loraswarm.memory.adapter_pages import AdapterPages
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.packing import Packing
from loraswarm.memory.page_pool import PagePool
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
    """An order to write an adapter into the pool before the step runs.

    Piece i of its packing begins at element `starts[i]`. `shared` has a place for each of
    `info.shared_matrices()`: those not written there yet are to be written too, whether or not
    another load of the step is to do so, since that load may fail.
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


class AdapterCache:
    """Adapters in the pool: pinned while a sequence uses them, else evicted least recently used."""

    def __init__(self, pool: PagePool, shape: BaseShape, geometry: PageGeometry) -> None:
        self._pool = pool
        self._shape = shape
        self._geometry = geometry
        self._pages = AdapterPages(pool, geometry.page_elements)
        self._pins: dict[AdapterKey, int] = {}
        self._idle: OrderedDict[AdapterKey, None] = OrderedDict()
        self._matrices: dict[AdapterKey, tuple[SharedMatrix, ...]] = {}
        self._shared: dict[SharedMatrix, _Shared] = {}

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    @property
    def num_resident(self) -> int:
        return len(self._pins) + len(self._idle)

    def is_resident(self, key: AdapterKey) -> bool:
        return key in self._pins or key in self._idle

    def num_bytes(self, info: AdapterInfo) -> AdapterBytes:
        """Bytes the adapter takes in the pool: its own, and of matrices it may share."""
        return adapter_bytes(info, self._shape, self._geometry)

    def num_pages(self, info: AdapterInfo) -> int:
        """The most pages the adapter has a part in, whomever it shares them with."""
        packings = [self._shared_layout(matrix).packing for matrix in info.shared_matrices()]
        packings.append(self._layout(info).packing)
        return sum(packing.max_pages for packing in packings)

    def num_load_pages(self, info: AdapterInfo) -> int:
        """The most pages that pinning takes now, or after any eviction of idle adapters.

        Shared matrices of pinned adapters are there already; an adapter that is resident and stays
        so takes none.
        """
        pinned = self._pinned_matrices()
        num_pages = self._layout(info).packing.max_pages
        for matrix in info.shared_matrices():
            if matrix not in pinned:
                num_pages += self._shared_layout(matrix).packing.max_pages
        return num_pages

    def num_idle_pages(self) -> int:
        """Pages that eviction of every idle adapter would free.

        Pages and shared matrices that a pinned adapter has a part in stay.
        """
        if not self._idle:
            return 0
        pinned = [_holder(key) for key in self._pins]
        pinned += [_shared_holder(matrix) for matrix in self._pinned_matrices()]
        return self._pool.num_owned("adapter") - self._pages.num_held(pinned)

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
        matrices = info.shared_matrices()
        absent = {
            matrix: self._shared_layout(matrix) for matrix in matrices if matrix not in self._shared
        }
        wanted: dict[str, Packing] = {
            _shared_holder(matrix): shared.packing for matrix, shared in absent.items()
        }
        wanted[_holder(key)] = layout.packing
        starts = self._pages.take(wanted)
        for matrix, shared in absent.items():
            place = SharedPlace(matrix, shared, starts[_shared_holder(matrix)])
            self._shared[matrix] = _Shared(place)
        for matrix in matrices:
            self._shared[matrix].users.add(key)
        self._matrices[key] = matrices
        self._pins[key] = 1
        places = tuple(self._shared[matrix].place for matrix in matrices)
        return AdapterLoad(info, layout, starts[_holder(key)], places)

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
            self._free(key)
            evicted.append(key)
        return evicted

    def pin_evicting(self, info: AdapterInfo) -> tuple[AdapterLoad | None, list[AdapterKey]]:
        """`pin`, after evicting as few idle adapters, least recently used first, as make it fit.

        Returns the load and those evicted. A gap that an adapter leaves in a shared page may do.
        Raises   OutOfPages if it does not fit with every idle adapter evicted; those are gone.
        """
        evicted: list[AdapterKey] = []
        while True:
            try:
                return self.pin(info), evicted
            except OutOfPages:
                if not self._idle:
                    raise
                key, _ = self._idle.popitem(last=False)
                self._free(key)
                evicted.append(key)

    def discard(self, key: AdapterKey) -> None:
        """Forget an idle adapter whose bytes were never written (its load failed)."""
        assert key not in self._pins, f"discard of a pinned adapter: {key}"
        if key in self._idle:
            del self._idle[key]
            self._free(key)

    def check(self) -> None:
        """Assert that pins are positive, and that resident adapters and the matrices they share,
        and only they, have pages."""
        assert all(count > 0 for count in self._pins.values())
        assert not self._pins.keys() & self._idle.keys()
        assert self._matrices.keys() == self._pins.keys() | self._idle.keys()
        users: dict[SharedMatrix, set[AdapterKey]] = {}
        for key, matrices in self._matrices.items():
            for matrix in matrices:
                users.setdefault(matrix, set()).add(key)
        assert users == {matrix: shared.users for matrix, shared in self._shared.items()}
        self._pages.check([*map(_holder, self._matrices), *map(_shared_holder, self._shared)])

    def _free(self, key: AdapterKey) -> None:
        """Give back the adapter's pages, and those of matrices that it was the last to use."""
        self._pages.free(_holder(key))
        for matrix in self._matrices.pop(key):
            shared = self._shared[matrix]
            shared.users.remove(key)
            if not shared.users:
                self._pages.free(_shared_holder(matrix))
                del self._shared[matrix]

    def _pinned_matrices(self) -> set[SharedMatrix]:
        return {matrix for key in self._pins for matrix in self._matrices[key]}

    def _layout(self, info: AdapterInfo) -> AdapterLayout:
        return adapter_layout(info, self._shape, self._geometry)

    def _shared_layout(self, matrix: SharedMatrix) -> SharedLayout:
        return shared_layout(matrix.num_rows, matrix.width, self._shape, self._geometry)


def _holder(key: AdapterKey) -> str:
    return "@".join(key)


def _shared_holder(matrix: SharedMatrix) -> str:
    return f"shared {matrix.digest} {matrix.num_rows}x{matrix.width}"
