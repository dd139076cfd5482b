"""Sequences and the pages that hold their K and V. Index side only, no torch.

Grows a sequence's pages token by token; the pool remembers who owns them.
"""

from __future__ import annotations

from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.page_pool import Owner, PagePool


class KVCache:
    """K/V pages by sequence. Token c of a sequence lies in its `c // page_tokens`-th page."""

    def __init__(self, pool: PagePool, geometry: PageGeometry) -> None:
        self._pool = pool
        self._geometry = geometry

    @property
    def page_tokens(self) -> int:
        return self._geometry.page_tokens

    def num_missing_pages(self, request_id: str, num_tokens: int) -> int:
        """Pages the sequence still needs to hold `num_tokens` tokens."""
        held = len(self.pages_of(request_id))
        return max(0, self._geometry.pages_for_tokens(num_tokens) - held)

    def reserve(self, request_id: str, num_tokens: int) -> None:
        """Make room for the sequence's first `num_tokens` tokens. Raises OutOfPages, unchanged."""
        missing = self.num_missing_pages(request_id, num_tokens)
        self._pool.allocate(missing, _owner(request_id))

    def free(self, request_id: str) -> None:
        """Give back the sequence's pages."""
        self._pool.free(_owner(request_id))

    def pages_of(self, request_id: str) -> list[int]:
        """The sequence's pages in token order; read only."""
        return self._pool.pages_of(_owner(request_id))


def _owner(request_id: str) -> Owner:
    return Owner("kv", request_id)
