"""The pages of a replica and the adapters that it holds: in pages, in host memory, on their way.

Idle adapters leave in the order of the engine's own memory/eviction. Loads from the store come one
after the other. Knows no requests but by how many use an adapter; seconds are the cost model's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from loraswarm.cluster.view import HeldTier, ReplicaLimits
from loraswarm.core.cost_model import CostFigures
from loraswarm.memory.eviction import EvictionOrder


class Surroundings(Protocol):
    """What a replica is given by the simulation around it."""

    @property
    def costs(self) -> CostFigures: ...

    def now_s(self) -> float: ...

    def bytes_of(self, adapter: str) -> int: ...

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call it when so much time has passed."""
        ...

    def set_tier(self, replica_id: str, adapter: str, tier: HeldTier | None) -> None: ...

    def wake(self, replica_id: str) -> None:
        """Something has changed there, so that a step may be possible that was not."""
        ...


@dataclass(slots=True)
class _Copy:
    """An adapter in pages; until it `is_ready` its bytes are on their way."""

    num_pages: int
    num_pins: int = 0
    is_ready: bool = False


class Stock:
    """`num_free` pages are nobody's. `on_arrival` is called when an adapter has come to host memory
    or is ready in its pages."""

    def __init__(
        self,
        replica_id: str,
        limits: ReplicaLimits,
        around: Surroundings,
        on_arrival: Callable[[str], None],
    ) -> None:
        self.num_free = limits.num_pages
        self.num_loads = 0
        self._replica_id = replica_id
        self._limits = limits
        self._around = around
        self._on_arrival = on_arrival
        self._copies: dict[str, _Copy] = {}
        self._host: dict[str, int] = {}
        self._host_bytes = 0
        self._num_idle_pages = 0
        self._num_waiting: dict[str, int] = {}
        self._copy_order = EvictionOrder[str]("cost", around.now_s)
        self._host_order = EvictionOrder[str]("cost", around.now_s)
        self._wanted: deque[str] = deque()
        self._prefetched: deque[str] = deque()
        self._coming: set[str] = set()
        self._loading: str | None = None

    @property
    def num_available(self) -> int:
        """Pages that are free, or could be at once."""
        return self.num_free + self._num_idle_pages

    def is_at_hand(self, adapter: str) -> bool:
        """In pages or in host memory."""
        return adapter in self._copies or adapter in self._host

    def is_ready(self, adapter: str) -> bool:
        return adapter in self._copies and self._copies[adapter].is_ready

    def pages_of(self, adapter: str) -> int:
        """That it would take; none if it has them."""
        if adapter in self._copies:
            return 0
        return -(-self._around.bytes_of(adapter) // self._limits.page_bytes)

    def idle_pages_of(self, adapter: str) -> int:
        """That it has and nobody runs with, so that they count as available."""
        copy = self._copies.get(adapter)
        return copy.num_pages if copy is not None and self._is_idle(copy) else 0

    def hold(self, adapter: str) -> None:
        """A request of it waits: it stays where it is, if it can, or is brought."""
        self._num_waiting[adapter] = self._num_waiting.get(adapter, 0) + 1
        self._host_order.withdraw(adapter)
        self._copy_order.withdraw(adapter)
        self.want(adapter)

    def release(self, adapter: str) -> None:
        """One that waited runs now, or is gone."""
        self._num_waiting[adapter] -= 1
        if self._num_waiting[adapter]:
            return
        del self._num_waiting[adapter]
        self._offer(adapter)
        self._load_next()

    def want(self, adapter: str) -> None:
        """Bring it to host memory before all that is only prefetched."""
        if self.is_at_hand(adapter):
            return
        if adapter in self._prefetched:
            self._prefetched.remove(adapter)
        elif adapter in self._coming:
            return
        self._coming.add(adapter)
        self._wanted.append(adapter)
        self._load_next()

    def prefetch(self, adapter: str) -> None:
        """Bring it to host memory, and to pages if some are free."""
        if adapter in self._host:
            self._copy_if_free(adapter)
        elif not self.is_at_hand(adapter) and adapter not in self._coming:
            self._coming.add(adapter)
            self._prefetched.append(adapter)
            self._load_next()

    def begin_with(self, adapter: str) -> None:
        """It is in host memory from the start, and in pages; where there is room, and as long as
        adapters have no more than half of the pool."""
        num_bytes = self._around.bytes_of(adapter)
        num_pages = self.pages_of(adapter)
        if adapter not in self._host and self._host_bytes + num_bytes <= self._limits.host_bytes:
            self._host_bytes += num_bytes
            self._enter_host(adapter)
        if num_pages and num_pages <= self.num_free - self._limits.num_pages // 2:
            self.num_free -= num_pages
            self._num_idle_pages += num_pages
            self._copies[adapter] = _Copy(num_pages, is_ready=True)
            self._offer(adapter)
            self._tell(adapter)

    def pin(self, adapter: str) -> None:
        """A request starts with it; if it has to be copied there must be room for its pages."""
        copy = self._copies.get(adapter)
        if copy is None:
            copy = self._begin_copy(adapter)
        elif self._is_idle(copy):
            self._num_idle_pages -= copy.num_pages
            self._copy_order.withdraw(adapter)
        copy.num_pins += 1
        self._copy_order.touch(adapter)
        if adapter in self._host:
            self._host_order.touch(adapter)

    def unpin(self, adapter: str) -> None:
        copy = self._copies[adapter]
        copy.num_pins -= 1
        if self._is_idle(copy):
            self._num_idle_pages += copy.num_pages
            self._offer(adapter)

    def make_room(self, num_pages: int) -> bool:
        """See that so many pages are free, by letting idle adapters go; those that are waited for
        go last. False, and nothing has gone, if that is not enough."""
        if num_pages > self.num_available:
            return False
        while self.num_free < num_pages:
            adapter = self._copy_order.lowest()
            self._drop(self._idle_and_held() if adapter is None else adapter)
        return True

    def check(self, num_kv_pages: int) -> None:
        """Assert that every page is somebody's once."""
        held = sum(copy.num_pages for copy in self._copies.values())
        assert held + num_kv_pages + self.num_free == self._limits.num_pages
        idle = [copy for copy in self._copies.values() if self._is_idle(copy)]
        assert sum(copy.num_pages for copy in idle) == self._num_idle_pages
        coming = self._around.bytes_of(self._loading) if self._loading is not None else 0
        in_host = sum(self._host.values()) + coming
        assert in_host == self._host_bytes <= self._limits.host_bytes
        assert self.num_free >= 0

    def _idle_and_held(self) -> str:
        """One that nobody runs with; to be asked for only where there is one."""
        copies = self._copies.items()
        return next(name for name, copy in copies if self._is_idle(copy))

    def _is_idle(self, copy: _Copy) -> bool:
        return copy.num_pins == 0 and copy.is_ready

    def _offer(self, adapter: str) -> None:
        """Let it leave pages and host memory if nobody runs with it or waits for it."""
        if adapter in self._num_waiting:
            return
        num_bytes, costs = self._around.bytes_of(adapter), self._around.costs
        copy_s = costs.copy_s(num_bytes)
        load_s = costs.load_s(num_bytes)
        if adapter in self._host:
            self._host_order.offer(adapter, load_s, num_bytes)
        copy = self._copies.get(adapter)
        if copy is not None and self._is_idle(copy):
            miss_s = copy_s if adapter in self._host else copy_s + load_s
            self._copy_order.offer(adapter, miss_s, num_bytes)

    def _drop(self, adapter: str) -> None:
        copy = self._copies.pop(adapter)
        self._copy_order.forget(adapter)
        self._num_idle_pages -= copy.num_pages
        self.num_free += copy.num_pages
        self._tell(adapter)
        if adapter in self._num_waiting:
            self.want(adapter)

    def _begin_copy(self, adapter: str) -> _Copy:
        num_pages = self.pages_of(adapter)
        assert adapter in self._host
        has_room = self.make_room(num_pages)
        assert has_room
        self.num_free -= num_pages
        copy = self._copies[adapter] = _Copy(num_pages)
        seconds = self._around.costs.copy_s(self._around.bytes_of(adapter))
        self._around.after(seconds, lambda: self._finish_copy(adapter))
        self._tell(adapter)
        return copy

    def _finish_copy(self, adapter: str) -> None:
        copy = self._copies[adapter]
        copy.is_ready = True
        if copy.num_pins == 0:
            self._num_idle_pages += copy.num_pages
            self._offer(adapter)
        self._on_arrival(adapter)

    def _copy_if_free(self, adapter: str) -> None:
        if adapter not in self._copies and self.pages_of(adapter) <= self.num_free:
            self._begin_copy(adapter)

    def _load_next(self) -> None:
        """Begin the next load, unless one is under way or host memory is full of what is needed."""
        queue = self._wanted or self._prefetched
        if self._loading is not None or not queue:
            return
        adapter = queue[0]
        num_bytes = self._around.bytes_of(adapter)
        if not self._make_host_room(num_bytes):
            return
        queue.popleft()
        self._loading = adapter
        self._host_bytes += num_bytes
        is_prefetch = queue is self._prefetched
        seconds = self._around.costs.load_s(num_bytes)
        self._around.after(seconds, lambda: self._finish_load(adapter, is_prefetch))

    def _make_host_room(self, num_bytes: int) -> bool:
        while self._host_bytes + num_bytes > self._limits.host_bytes:
            adapter = self._host_order.lowest()
            if adapter is None:
                return False
            self._host_order.forget(adapter)
            self._host_bytes -= self._host.pop(adapter)
            self._tell(adapter)
        return True

    def _finish_load(self, adapter: str, is_prefetch: bool) -> None:
        self._loading = None
        self.num_loads += 1
        self._coming.discard(adapter)
        self._enter_host(adapter)
        if is_prefetch:
            self._copy_if_free(adapter)
        self._on_arrival(adapter)
        self._load_next()

    def _enter_host(self, adapter: str) -> None:
        """Its bytes have been counted."""
        self._host[adapter] = self._around.bytes_of(adapter)
        self._offer(adapter)
        self._tell(adapter)

    def _tell(self, adapter: str) -> None:
        tier: HeldTier | None = "host" if adapter in self._host else None
        if adapter in self._copies:
            tier = "device"
        self._around.set_tier(self._replica_id, adapter, tier)
