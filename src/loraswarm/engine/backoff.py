"""How long to leave alone what has failed: twice as long after each failure in a row.

Knows neither what failed nor what is tried again. Used by engine/residency.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from loraswarm.core.events import ErrorInfo

FIRST_WAIT_S = 0.5
MAX_WAIT_S = 60.0
MAX_REMEMBERED = 4096
Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: ErrorInfo
    wait_s: float
    until_s: float


class Backoff(Generic[Item]):
    """Failures by item; the oldest are forgotten when there are very many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[Item, _Failure] = OrderedDict()

    def failed(self, item: Item, error: ErrorInfo) -> None:
        """It has failed; the next try is due after a wait."""
        before = self._failures.pop(item, None)
        wait_s = FIRST_WAIT_S if before is None else min(2 * before.wait_s, MAX_WAIT_S)
        self._failures[item] = _Failure(error, wait_s, self._clock() + wait_s)
        if len(self._failures) > MAX_REMEMBERED:
            self._failures.popitem(last=False)

    def succeeded(self, item: Item) -> None:
        """It went well; earlier failures are forgotten."""
        self._failures.pop(item, None)

    def refusal(self, item: Item) -> ErrorInfo | None:
        """Why it is not tried now; None if it may be."""
        failure = self._failures.get(item)
        left_s = failure.until_s - self._clock() if failure else 0.0
        if failure is None or left_s <= 0:
            return None
        message = f"{failure.error.message} (tried again in {left_s:.1f} s at the earliest)"
        return dataclasses.replace(failure.error, message=message)

    def last_error(self, item: Item) -> ErrorInfo | None:
        """What its last try failed with, if it has not gone well since."""
        failure = self._failures.get(item)
        return None if failure is None else failure.error
