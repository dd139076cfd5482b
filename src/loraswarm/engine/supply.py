"""What the scheduler asks of the tiers below the page pool. No torch.

Implemented by engine/residency; a stand-in serves where there are no tiers (simulation, tests).
"""

from __future__ import annotations

from typing import Protocol

from loraswarm.core.sequence import AdapterKey


class AdapterSupply(Protocol):
    """Host memory and stores, from where adapters come into pages."""

    def is_at_hand(self, key: AdapterKey) -> bool:
        """Whether the adapter is in host memory, so that it can be copied into pages now."""
        ...

    def want(self, key: AdapterKey) -> None:
        """Bring it to host memory, unless it is there or on its way."""
        ...

    def hold(self, key: AdapterKey) -> None:
        """A queued sequence needs it: it must not leave host memory until `release`; counted."""
        ...

    def release(self, key: AdapterKey) -> None: ...


class EverythingAtHand:
    """A supply without limits."""

    def is_at_hand(self, key: AdapterKey) -> bool:
        return True

    def want(self, key: AdapterKey) -> None:
        pass

    def hold(self, key: AdapterKey) -> None:
        pass

    def release(self, key: AdapterKey) -> None:
        pass
