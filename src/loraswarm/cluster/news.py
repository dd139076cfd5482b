"""Something has changed that others may be waiting for. Used by the front and the fleet."""

from __future__ import annotations

import asyncio


class News:
    """Wakes all that wait; says nothing about what has happened."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Wake all that wait now; those that come later wait for the next."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Until the next `tell`; False if so many seconds passed first."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
