"""Numbers for the contents that a name has had, one after the other.

Owns the last number of each name, also of names that are gone, boundedly. Used by the catalog.
"""

from __future__ import annotations

MAX_NAMES = 20_000


class Generations:
    """For each name, numbers that only rise; the first one is 1 at first.

    Names beyond MAX_NAMES are forgotten, those that were given a number longest ago first. A
    forgotten name, and any new one from then on, goes on above all that were forgotten.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._forgotten = 0

    def last(self, name: str) -> int:
        """The number given last."""
        return self._last.get(name, self._forgotten)

    def next(self, name: str) -> int:
        """One more."""
        number = self.last(name) + 1
        self._last.pop(name, None)
        self._last[name] = number
        if len(self._last) > MAX_NAMES:
            oldest = next(iter(self._last))
            self._forgotten = max(self._forgotten, self._last.pop(oldest))
        return number
