"""A clock that only events push on. Owns the heap of what is to happen; knows nothing of what."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Events:
    """`now_s` is the time of what happened last; what happens at one time does so in order."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num = 0

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        self._num += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._num, action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + seconds, action)

    @property
    def next_s(self) -> float | None:
        """When the next thing happens; None: nothing will."""
        return self._heap[0][0] if self._heap else None

    def happen(self) -> None:
        """Let the next thing happen, and all others of the same time that are known by then."""
        self.now_s = self._heap[0][0]
        while self._heap and self._heap[0][0] == self.now_s:
            heapq.heappop(self._heap)[2]()
