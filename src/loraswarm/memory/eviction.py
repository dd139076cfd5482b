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
    """A use counts half after `half_life_s`. Uses of the `max_remembered` items that were touched
    last are remembered, whether they are here or have left."""

    half_life_s: float = 300.0
    max_remembered: int = 50_000


class _Uses(NamedTuple):
    """`warmth` is log2 of the decayed number of uses at the last one, plus its time in half-lives;
    `number` counts all touches, so that ages differ where a clock's readings do not."""

    warmth: float
    number: int


class _Offer(NamedTuple, Generic[Item]):
    """Compared from the left; `serial` differs, so items are never compared."""

    score: float
    last_use: int
    serial: int
    item: Item


class EvictionOrder(Generic[Item]):
    """Items that may leave, lowest first.

    Semantics, policy "cost": the worth of a byte of item i at time t is
        cost_s[i] / num_bytes[i] * uses[i](t),    uses[i](t) = sum over uses at u of 2^((u - t) / h)
    with half-life h. Its log2 is score[i] - t / h, where
        score[i] = log2(cost_s[i] / num_bytes[i]) + log2(uses[i](last use)) + last use / h.
    t / h is the same for all, so comparing scores is comparing worths at any moment; and a score
    does not change between uses, so that a heap can hold it.
    Policy "lru": the least recently touched. Ties: least recently touched, then first offered.

    Cost    logarithmic per call; offers that were withdrawn stay in the heap until they come up or
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
        self._heap: list[_Offer[Item]] = []

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, item: object) -> bool:
        return item in self._offers

    def touch(self, item: Item) -> None:
        """Count a use of the item, whether or not it is here.

        An offer keeps the score it was made with: withdraw what is used, offer it afterwards.
        """
        now = self._clock() / self._rules.half_life_s
        before = self._uses.pop(item, None)
        num_uses = 1.0 if before is None else 1.0 + 2.0 ** (before.warmth - now)
        self._num_touches += 1
        self._uses[item] = _Uses(math.log2(num_uses) + now, self._num_touches)
        if len(self._uses) > self._rules.max_remembered:
            self._uses.popitem(last=False)

    def offer(self, item: Item, cost_s: float, num_bytes: int) -> None:
        """Let the item leave from now on; an offer made before is replaced.

        `cost_s` is what a miss of it costs. One whose uses are not remembered counts as used now.
        """
        if item not in self._uses:
            self.touch(item)
        uses = self._uses[item]
        score = float(uses.number)
        if self._policy == "cost":
            density = cost_s / max(num_bytes, 1)
            score = (math.log2(density) if density > 0 else -math.inf) + uses.warmth
        self._num_offers += 1
        offer = _Offer(score, uses.number, self._num_offers, item)
        self._offers[item] = offer
        heapq.heappush(self._heap, offer)
        if len(self._heap) > 2 * len(self._offers) + 64:
            self._heap = list(self._offers.values())
            heapq.heapify(self._heap)

    def withdraw(self, item: Item) -> None:
        """Keep the item from leaving: it is used, or something depends on it."""
        self._offers.pop(item, None)

    def forget(self, item: Item) -> None:
        """The item has left or is gone. Its uses are remembered, should it come back."""
        self.withdraw(item)

    def lowest(self) -> Item | None:
        """Who leaves next; None if nobody may. It stays offered until it is forgotten."""
        while self._heap:
            offer = self._heap[0]
            if self._offers.get(offer.item) is offer:
                return offer.item
            heapq.heappop(self._heap)
        return None
