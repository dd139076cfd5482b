"""Which adapters have pages, which of them are written, pinned or kept, and which may leave.

An adapter is pinned once per sequence that uses it; idle ones stay until their pages are wanted.
A shared matrix is resident while an adapter that uses it is. The bytes are written by others; this
class only says where. Called by the scheduler, the engine and, to evict, Memory. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.sequence import AdapterKey
from loraswarm.memory.adapter_pages import AdapterLoad, AdapterPages, SharedPlace
from loraswarm.memory.costs import CostModel
from loraswarm.memory.eviction import Evictable, EvictionOrder
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.page_pool import PagePool
from loraswarm.memory.tile_layout import AdapterBytes

__all__ = ["AdapterCache", "AdapterLoad", "SharedPlace"]


@dataclass(slots=True)
class _Resident:
    """An adapter that has pages.

    `num_cached` prefix pages were made by it, `num_used` of them are used by sequences. A kept one
    is an operator's; a dropped one is freed as soon as it is neither pinned nor being written.
    """

    load: AdapterLoad
    num_bytes: int
    state: Literal["writing", "ready", "failed"] = "writing"
    num_pins: int = 0
    num_cached: int = 0
    num_used: int = 0
    is_kept: bool = False
    is_dropped: bool = False

    @property
    def may_leave(self) -> bool:
        """Whether eviction can free it, after the prefixes it made."""
        is_busy = self.num_pins or self.num_used or self.is_kept
        return self.state != "writing" and not is_busy

    @property
    def is_over(self) -> bool:
        """Whether it is to be freed at once."""
        is_unwanted = self.is_dropped or self.state == "failed"
        return is_unwanted and self.may_leave and not self.num_cached


class AdapterCache:
    """Adapters in the pool.

        pin          writing --- finish_load ---> ready         pinned, or not: then it is idle and
                        |                                       may leave, unless an operator keeps
                        `------- fail_load -----> failed        it; a failed one is freed when the
                                                                last pin is taken back

    An idle adapter is offered to the order for what bringing back it *and* the prefixes that it
    made would cost, and for the bytes of both, since none of them is of use without it: when it
    comes up they leave first. One that queued requests want (protected) is not offered: Memory
    evicts it when the order is empty. Who sets `touched` to a set finds there those that have
    become ready or have left since.
    """

    def __init__(
        self,
        pool: PagePool,
        shape: BaseShape,
        geometry: PageGeometry,
        order: EvictionOrder[Evictable],
        costs: CostModel,
        is_in_host: Callable[[AdapterKey], bool],
    ) -> None:
        self._pool = pool
        self._geometry = geometry
        self._order = order
        self._costs = costs
        self._is_in_host = is_in_host
        self._pages = AdapterPages(pool, shape, geometry)
        self._residents: dict[AdapterKey, _Resident] = {}
        self._protected: dict[AdapterKey, int] = {}
        self._left: list[AdapterKey] = []
        self._known_idle_pages: int | None = None
        self.touched: set[AdapterKey] | None = None
        self.total_evictions = 0

    @property
    def num_pinned(self) -> int:
        return sum(resident.num_pins > 0 for resident in self._residents.values())

    @property
    def num_resident(self) -> int:
        return len(self._residents)

    def is_resident(self, key: AdapterKey) -> bool:
        """Whether it has pages, written or not."""
        return key in self._residents

    def is_ready(self, key: AdapterKey) -> bool:
        """Whether it has pages and its bytes are there."""
        resident = self._residents.get(key)
        return resident is not None and resident.state == "ready"

    def has_failed(self, key: AdapterKey) -> bool:
        """Whether its load failed and somebody has it pinned still."""
        resident = self._residents.get(key)
        return resident is not None and resident.state == "failed"

    def is_kept(self, key: AdapterKey) -> bool:
        return key in self._residents and self._residents[key].is_kept

    def keys(self) -> tuple[AdapterKey, ...]:
        """Adapters that are resident."""
        return tuple(self._residents)

    def num_bytes(self, info: AdapterInfo) -> AdapterBytes:
        """Bytes the adapter takes in the pool: its own, and of matrices it may share."""
        return self._pages.num_bytes(info)

    def num_pages(self, info: AdapterInfo) -> int:
        """The most pages the adapter has a part in, whomever it shares them with."""
        return self._pages.most_pages(info)

    def num_load_pages(self, info: AdapterInfo) -> int:
        """The most pages that pinning an absent adapter takes now, or after any eviction.

        Shared matrices of adapters that may not leave are there already.
        """
        return self._pages.most_pages(info, self._staying())

    def least_load_pages(self, info: AdapterInfo) -> int:
        """Pages that pinning takes even if every gap of a shared page serves."""
        return 0 if info.key in self._residents else self._pages.least_pages(info)

    def num_idle_pages(self) -> int:
        """Pages of adapters that eviction of every one that may leave would free.

        Pages and shared matrices that one which stays has a part in stay.
        """
        if self._known_idle_pages is None:
            num_staying = self._pages.num_held(self._staying())
            self._known_idle_pages = self._pool.num_owned("adapter") - num_staying
        return self._known_idle_pages

    def pin(self, info: AdapterInfo) -> AdapterLoad | None:
        """Pin for one sequence; returns the load to carry out if the adapter was not resident, or
        if its last load failed and others have it pinned still.

        Raises   OutOfPages: nothing changed, so the caller can evict and retry.
        """
        resident = self._residents.get(info.key)
        is_new = resident is None or resident.state == "failed"
        if resident is None:
            load = self._pages.take(info)
            resident = _Resident(load, self.num_bytes(info).own)
            self._residents[info.key] = resident
        resident.num_pins += 1
        if is_new:
            resident.state = "writing"
        self._settle(info.key)
        return resident.load if is_new else None

    def unpin(self, key: AdapterKey, was_used: bool = True) -> None:
        """Take back one pin; with the last one the adapter becomes idle, if it is written.

        A use counts when it ends; not if the sequence could not start (`was_used` is False).
        """
        resident = self._residents.get(key)
        assert resident, f"unpin of an adapter that is not resident: {key}"
        assert resident.num_pins > 0, f"unpin of an adapter that is not pinned: {key}"
        resident.num_pins -= 1
        if was_used:
            self._order.touch(key)
        self._settle(key)

    def finish_load(self, key: AdapterKey) -> None:
        """The adapter's bytes are in its pages now."""
        self._end_load(key, "ready")

    def fail_load(self, key: AdapterKey) -> None:
        """The adapter's bytes are not there and will not come: it is freed once it is unpinned."""
        self._end_load(key, "failed")

    def protect(self, key: AdapterKey) -> None:
        """Count one more queued request that wants the adapter, resident or not."""
        self._protected[key] = self._protected.get(key, 0) + 1
        self._settle(key)

    def unprotect(self, key: AdapterKey) -> None:
        """Take back one `protect`."""
        assert key in self._protected, f"unprotect of an adapter that is not protected: {key}"
        self._protected[key] -= 1
        if self._protected[key] == 0:
            del self._protected[key]
        self._settle(key)

    def keep(self, key: AdapterKey) -> None:
        """Never evict the adapter, which must be resident, until `unkeep` or `drop`."""
        self._residents[key].is_kept = True
        self._settle(key)

    def unkeep(self, key: AdapterKey) -> None:
        """Take back `keep`; nothing happens if it is not kept (its load failed, say)."""
        if key in self._residents:
            self._residents[key].is_kept = False
            self._settle(key)

    def drop(self, key: AdapterKey) -> None:
        """Free the adapter as soon as it is not pinned, written or used; kept or not."""
        if key in self._residents:
            self._residents[key].is_dropped = True
            self._residents[key].is_kept = False
            self._settle(key)

    def evict(self, key: AdapterKey) -> None:
        """Free an adapter that may leave, after the prefixes it made."""
        resident = self._residents[key]
        assert resident.may_leave, f"eviction of an adapter that may not leave: {key}"
        assert not resident.num_cached, f"eviction of an adapter before its prefixes: {key}"
        self._free(key)
        self.total_evictions += 1

    def last_resort(self) -> AdapterKey | None:
        """Of the protected adapters that may leave the one protected last; None if none may."""
        for key in reversed(self._protected):
            if key in self._residents and self._residents[key].may_leave:
                return key
        return None

    def take_left(self) -> list[AdapterKey]:
        """Adapters that left their pages since last asked, for whatever reason."""
        left, self._left = self._left, []
        return left

    def accepts_prefixes(self, key: AdapterKey) -> bool:
        """Whether pages that the adapter makes may be cached: it is here and not being dropped."""
        return key in self._residents and not self._residents[key].is_dropped

    def count_prefix_pages(self, key: AdapterKey, num_cached: int, num_used: int) -> None:
        """So many more (or less, below 0) prefix pages of the adapter are cached, and are used."""
        resident = self._residents[key]
        resident.num_cached += num_cached
        resident.num_used += num_used
        if resident.num_pins == 0:
            self._settle(key)

    def num_prefix_pages(self) -> dict[AdapterKey, tuple[int, int]]:
        """What `count_prefix_pages` has counted: pages cached, and used, by adapter."""
        counts = {key: (each.num_cached, each.num_used) for key, each in self._residents.items()}
        return {key: count for key, count in counts.items() if any(count)}

    def check(self) -> int:
        """Assert that resident adapters and the matrices they share, and only they, have pages, and
        that the order has exactly those that may leave unprotected; returns how many those are."""
        num_offered = 0
        for key, resident in self._residents.items():
            assert resident.num_pins >= 0
            assert 0 <= resident.num_used <= resident.num_cached
            assert not resident.is_over, f"{key} should have been freed"
            is_offered = resident.may_leave and key not in self._protected
            assert (key in self._order) == is_offered
            num_offered += is_offered
        assert all(count > 0 for count in self._protected.values())
        self._pages.check(self._residents.keys())
        known = self._known_idle_pages
        self._known_idle_pages = None
        assert known in (None, self.num_idle_pages()), "idle pages are counted wrong"
        return num_offered

    def _settle(self, key: AdapterKey) -> None:
        """Free, offer or withhold the adapter, whatever its state says now."""
        resident = self._residents.get(key)
        if resident is None:
            return
        self._known_idle_pages = None
        if resident.is_over:
            self._free(key)
        elif resident.may_leave and key not in self._protected:
            page_tokens, page_bytes = self._geometry.page_tokens, self._geometry.page_bytes
            cost_s = self._costs.adapter_s(resident.num_bytes, self._is_in_host(key))
            cost_s += resident.num_cached * self._costs.prefix_page_s(page_tokens, 0)
            num_bytes = resident.num_bytes + resident.num_cached * page_bytes
            self._order.offer(key, cost_s, num_bytes)
        else:
            self._order.withdraw(key)

    def _end_load(self, key: AdapterKey, state: Literal["ready", "failed"]) -> None:
        resident = self._residents[key]
        assert resident.state == "writing", f"end of a load that is not under way: {key}"
        resident.state = state
        if state == "failed":
            resident.is_kept = False
        self._touch(key)
        self._settle(key)

    def _free(self, key: AdapterKey) -> None:
        del self._residents[key]
        self._known_idle_pages = None
        self._order.forget(key)
        self._left.append(key)
        self._touch(key)
        self._pages.free(key)

    def _touch(self, key: AdapterKey) -> None:
        if self.touched is not None:
            self.touched.add(key)

    def _staying(self) -> list[AdapterKey]:
        return [key for key, resident in self._residents.items() if not resident.may_leave]
