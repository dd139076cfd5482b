"""Who leaves memory next: one order of everything that may leave, by what it is worth or by age.

Knows neither pages nor bytes of anything: an item is a name, with what a miss of it costs and what
it takes. One order holds idle adapters and cached prefix pages of the pool, another the host cache.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from loraswarm.config import Eviction
from loraswarm.core.sequence import AdapterKey

Evictable = AdapterKey | bytes
"""What leaves the pool: an adapter by its key, a cached prefix page by its hash."""

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """How the expected uses of an item fade: soon after a use, as when a conversation goes on, by
    half every `burst_half_life_s`; those of its popularity by half every `popular_half_life_s`.

    Uses of the `max_remembered` items that were touched last are remembered, whether they are here
    or have left. Source: benchmarks/eviction.py --sweep.
    """

    burst_half_life_s: float = 6.0
    popular_half_life_s: float = 2000.0
    max_remembered: int = 50_000


class _Uses(NamedTuple):
    """`num_uses` as they count at the last one, at `last_s`; `number` counts all touches, so that
    ages differ where a clock's readings do not."""

    num_uses: float
    last_s: float
    number: int


class _Offer(NamedTuple, Generic[Item]):
    """Compared from the left; `serial` differs, so items are never compared."""

    score: float
    last_use: int
    serial: int
    item: Item
    popular_score: float


class EvictionOrder(Generic[Item]):
    """Items that may leave, lowest first.

    Semantics, policy "cost": an item of age a (seconds since its last use) and n uses is worth
        cost_s / num_bytes * max(2^(-a / hb) / hb, n * 2^(-a / hp) / hp)
    a byte: what a miss costs, times the uses a second to be expected. It is wanted again soon, as
    the next turn of a conversation, or by its popularity, whichever promises more; hb and hp are
    the half-lives of the two. A use `gap` seconds after the last one adds 1 - 2^(-gap / hb) to n,
    so that a burst counts about once.
    Policy "lru": the least recently touched. Ties: least recently touched, then first offered.

        bursts    log2 of the first term, plus now / hb      neither changes between uses, so that
        popular   log2 of the second, plus now / hp          heaps can hold them

    The first term falls faster: an offer begins in `bursts` and moves to `popular`, once, when it
    comes up there and the second is larger. What is in `bursts` is worth its first term at least,
    so the lower of both tops, so moved, is the lowest of all.

    Cost    logarithmic per call; offers that were withdrawn stay in a heap until they come up or
            outnumber the others.
    """

    def __init__(
        self,
        policy: Eviction,
        clock: Callable[[], float] = time.monotonic,
        rules: EvictionRules | None = None,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._rules = rules or EvictionRules()
        self._uses: OrderedDict[Item, _Uses] = OrderedDict()
        self._num_touches = 0
        self._num_offers = 0
        self._offers: dict[Item, _Offer[Item]] = {}
        self._bursts: list[_Offer[Item]] = []
        self._popular: list[_Offer[Item]] = []

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, item: object) -> bool:
        return item in self._offers

    def touch(self, item: Item) -> None:
        """Count a use of the item, whether or not it is here.

        An offer keeps the score it was made with: withdraw what is used, offer it afterwards.
        """
        now_s = self._clock()
        before = self._uses.pop(item, None)
        num_uses = 1.0
        if before is not None:
            gap_s = now_s - before.last_s
            num_uses = before.num_uses * 2.0 ** (-gap_s / self._rules.popular_half_life_s)
            num_uses += 1.0 - 2.0 ** (-gap_s / self._rules.burst_half_life_s)
        self._num_touches += 1
        self._uses[item] = _Uses(num_uses, now_s, self._num_touches)
        if len(self._uses) > self._rules.max_remembered:
            self._uses.popitem(last=False)

    def offer(self, item: Item, cost_s: float, num_bytes: int) -> None:
        """Let the item leave from now on; an offer made before is replaced.

        `cost_s` is what a miss of it costs. One whose uses are not remembered counts as used now.
        """
        if item not in self._uses:
            self.touch(item)
        uses = self._uses[item]
        self._num_offers += 1
        scores = float(uses.number), 0.0
        if self._policy == "cost":
            scores = self._scores(uses, cost_s / max(num_bytes, 1))
        offer = _Offer(scores[0], uses.number, self._num_offers, item, scores[1])
        self._offers[item] = offer
        heapq.heappush(self._bursts, offer)
        if len(self._bursts) + len(self._popular) > 2 * len(self._offers) + 64:
            self._bursts = list(self._offers.values())
            heapq.heapify(self._bursts)
            self._popular = []

    def withdraw(self, item: Item) -> None:
        """Keep the item from leaving: it is used, or something depends on it."""
        self._offers.pop(item, None)

    def forget(self, item: Item) -> None:
        """The item has left or is gone. Its uses are remembered, should it come back."""
        self.withdraw(item)

    def lowest(self) -> Item | None:
        """Who leaves next; None if nobody may. It stays offered until it is forgotten."""
        now_s = self._clock()
        fallen = now_s / self._rules.burst_half_life_s, now_s / self._rules.popular_half_life_s
        burst = self._top(self._bursts)
        while burst and self._is_popular(burst, fallen):
            heapq.heappop(self._bursts)
            heapq.heappush(self._popular, burst._replace(score=burst.popular_score))
            burst = self._top(self._bursts)
        popular = self._top(self._popular)
        if burst is None or popular is None:
            offer = burst or popular
            return None if offer is None else offer.item
        is_burst_lower = burst.score - fallen[0] < popular.score - fallen[1]
        return burst.item if is_burst_lower else popular.item

    def _is_popular(self, offer: _Offer[Item], fallen: tuple[float, float]) -> bool:
        """Whether popularity promises more uses of the item by now than its last burst."""
        if self._policy == "lru":
            return False
        return offer.popular_score - fallen[1] > offer.score - fallen[0]

    def _top(self, heap: list[_Offer[Item]]) -> _Offer[Item] | None:
        """The lowest of a heap that still stands."""
        while heap:
            standing = self._offers.get(heap[0].item)
            if standing is not None and standing.serial == heap[0].serial:
                return heap[0]
            heapq.heappop(heap)
        return None

    def _scores(self, uses: _Uses, density: float) -> tuple[float, float]:
        """The two terms for an item whose byte costs `density` seconds, as the heaps hold them."""
        burst_s, popular_s = self._rules.burst_half_life_s, self._rules.popular_half_life_s
        log_density = math.log2(density) if density > 0 else -math.inf
        return (
            log_density - math.log2(burst_s) + uses.last_s / burst_s,
            log_density + math.log2(uses.num_uses / popular_s) + uses.last_s / popular_s,
        )
