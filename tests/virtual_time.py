"""An event loop whose clock jumps to what is due next: sleeping costs nothing and is exact."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Begins at 0 seconds. Only for coroutines that wait for each other and for `sleep`."""

    def __init__(self) -> None:
        self._virtual_s = 0.0
        super().__init__()
        look = self._selector.select

        def select(timeout_s: float | None) -> Any:
            found = look(0)
            if not found:
                assert timeout_s is not None, "everything waits and nothing is due"
                self._virtual_s += timeout_s
            return found

        self._selector.select = select

    def time(self) -> float:
        return self._virtual_s


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, run in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
