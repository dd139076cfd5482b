"""Sequences and the pages that hold their K and V. Index side only, no torch.

Gives a sequence the cached pages of its prefix, grows it token by token, and caches what it has
computed. The pool remembers who owns a page, PrefixCache who uses a cached one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.page_pool import Owner, PagePool
from loraswarm.memory.prefix_cache import CachedPage, HeldPage, PrefixCache, PrefixSalt


@dataclass(slots=True)
class _SequencePages:
    """Pages in token order, and the cached prefix that the first of them hold.

        table   | c0 | c1 | own | own | own |
        chain   | c0 | c1 | c2  |              c2: the same prefix, in a page of somebody else

    The sequence uses every page of `chain`, also one that it has a page of its own for. It has
    started when it has reserved pages; `num_known` tokens were known when it began.
    """

    salt: PrefixSalt | None = None
    num_known: int = 0
    has_started: bool = False
    table: list[int] = field(default_factory=list)
    chain: list[CachedPage] = field(default_factory=list)


class KVCache:
    """K/V pages by sequence. Token c of a sequence lies in its `c // page_tokens`-th page."""

    def __init__(
        self, pool: PagePool, geometry: PageGeometry, prefixes: PrefixCache | None
    ) -> None:
        self._pool = pool
        self._geometry = geometry
        self._prefixes = prefixes
        self._sequences: dict[str, _SequencePages] = {}

    @property
    def page_tokens(self) -> int:
        return self._geometry.page_tokens

    def begin(
        self, request_id: str, token_ids: Sequence[int], salt: PrefixSalt, max_tokens: int
    ) -> int:
        """Give a new sequence the cached pages of its longest known prefix of at most `max_tokens`
        tokens (whole pages), used by it from now on. Returns the tokens they hold.

        It counts, for statistics and eviction, from the first `reserve` on.
        """
        assert request_id not in self._sequences, f"{request_id} has begun already"
        pages = _SequencePages(salt, len(token_ids))
        if self._prefixes is not None:
            pages.chain = self._prefixes.begin(token_ids, salt, max_tokens)
            pages.table = [cached.page for cached in pages.chain]
        self._sequences[request_id] = pages
        return len(pages.table) * self.page_tokens

    def num_missing_pages(self, request_id: str, num_tokens: int) -> int:
        """Pages the sequence still needs to hold `num_tokens` tokens."""
        held = len(self.pages_of(request_id))
        return max(0, self._geometry.pages_for_tokens(num_tokens) - held)

    def reserve(self, request_id: str, num_tokens: int) -> None:
        """Make room for the sequence's first `num_tokens` tokens. Raises OutOfPages, unchanged."""
        missing = self.num_missing_pages(request_id, num_tokens)
        taken = self._pool.allocate(missing, _owner(request_id))
        pages = self._sequences.setdefault(request_id, _SequencePages())
        pages.table += taken
        if not pages.has_started and self._prefixes is not None:
            self._prefixes.count_start(pages.num_known, pages.chain)
        pages.has_started = True

    def publish(self, request_id: str, token_ids: Sequence[int], num_computed: int) -> None:
        """Cache the full pages of the first `num_computed` tokens, still used by the sequence.

        Where the same prefix is cached already the sequence keeps its own page. Does nothing
        without prefix cache, and for adapters that are being dropped.
        """
        if self._prefixes is None:
            return
        pages = self._sequences[request_id]
        assert pages.salt is not None, f"{request_id} publishes but has not begun"
        assert num_computed <= len(token_ids)
        size = self.page_tokens
        for index in range(len(pages.chain), num_computed // size):
            held = HeldPage(pages.table[index], _owner(request_id))
            tokens = token_ids[index * size : (index + 1) * size]
            if not self._prefixes.extend(pages.chain, pages.salt, tokens, held):
                return

    def free(self, request_id: str) -> None:
        """Give back the sequence's pages; cached ones stay, and may leave when nobody uses them."""
        pages = self._sequences.pop(request_id, None)
        if pages is None:
            return
        self._pool.free(_owner(request_id))
        if self._prefixes is not None:
            self._prefixes.release(reversed(pages.chain), pages.has_started)

    def pages_of(self, request_id: str) -> list[int]:
        """The sequence's pages in token order; read only."""
        pages = self._sequences.get(request_id)
        return [] if pages is None else pages.table

    def check(self) -> None:
        """Assert that a sequence's pages are its own or those of its cached prefix, and that the
        users of a cached page are these sequences."""
        num_users: dict[CachedPage, int] = {}
        for request_id, pages in self._sequences.items():
            own = self._pool.pages_of(_owner(request_id))
            cached = [page.page for page in pages.chain if page.page in pages.table]
            assert sorted(pages.table) == sorted(own + cached), f"pages of {request_id}"
            assert [page.index for page in pages.chain] == list(range(len(pages.chain)))
            assert len(pages.chain) <= len(pages.table)
            for page in pages.chain:
                num_users[page] = num_users.get(page, 0) + 1
        assert all(page.num_users == count for page, count in num_users.items())


def _owner(request_id: str) -> Owner:
    return Owner("kv", request_id)
