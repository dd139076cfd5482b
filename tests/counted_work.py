"""Work counted instead of timed: the same number on a busy machine and on a quiet one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TooManyCalls(BaseException):
    """Passes through code that handles every `Exception`."""


@contextmanager
def at_most_calls(limit: int) -> Iterator[None]:
    """Stops this thread's work within as soon as it has called `limit` functions of Python or C."""
    num_calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")
        if num_calls > limit:
            raise TooManyCalls(f"more than {limit} calls, in {frame.f_code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
