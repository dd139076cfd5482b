"""Which pages hold K and V of which prefixes: a tree of full pages found by hash. No torch.

A page's hash covers all tokens up to its end and every adapter that made them, by digest, so that
nothing else can match. Called by KVCache for sequences and by Memory to evict and to drop.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

from loraswarm.core.sequence import AdapterKey, AdapterMix
from loraswarm.memory.costs import CostModel
from loraswarm.memory.eviction import Evictable, EvictionOrder
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.page_pool import Owner, PagePool

HASH_BYTES = 16
_ROOT = bytes(HASH_BYTES)


@dataclass(frozen=True, slots=True)
class PrefixSalt:
    """What computes a sequence's tokens: the base before `first_adapted`, then `mix`.

        page        | base      | boundary  | adapted   |
        tag         | b""       | mix, n    | mix, 0    |     n: tokens before first_adapted

    Pages of the base alone have no tag, whoever computed them: all share them.
    """

    mix: AdapterMix
    first_adapted: int = 0

    def keys_of(self, page_end: int) -> tuple[AdapterKey, ...]:
        """The adapters that made tokens of the page that ends at `page_end`."""
        if page_end <= self.first_adapted:
            return ()
        return tuple(key for key, _ in self.mix)

    def tag_of(self, page_begin: int, page_end: int) -> bytes:
        """What tells the page from one of the same tokens that others made."""
        if not self.keys_of(page_end):
            return b""
        num_base = max(self.first_adapted - page_begin, 0)
        return blake2b(repr((self.mix, num_base)).encode(), digest_size=HASH_BYTES).digest()


@dataclass(slots=True, eq=False)
class CachedPage:
    """A full page of computed K and V: the `index`-th of its prefix.

    `num_users` sequences use it, and with it all pages before it; `num_children` cached pages come
    right after it. A dropped page is found by nobody and is freed with its last user.
    """

    page: int
    digest: bytes
    index: int
    parent: CachedPage | None
    keys: tuple[AdapterKey, ...]
    num_users: int = 0
    num_children: int = 0
    is_dropped: bool = False


class HeldPage(NamedTuple):
    """A page that a sequence has computed, and the owner it has in the pool."""

    page: int
    owner: Owner


class PrefixOwners(Protocol):
    """The adapters that cached pages depend on."""

    def accepts_prefixes(self, key: AdapterKey) -> bool:
        """Whether pages may be cached that this adapter made: it is here and is to stay."""
        ...

    def count_prefix_pages(self, key: AdapterKey, num_cached: int, num_used: int) -> None:
        """So many more (or less, below 0) pages of the adapter are cached, and are in use."""
        ...


class PrefixCache:
    """Cached pages by hash, each used by any number of sequences or idle.

        base   [0] -- [1] -- [2]          sequences share pages from the root on;
                   \\                      a page leaves before the pages it follows,
        sql          [1] -- [2]           and only when it is idle

    Who uses a page uses all before it, so what follows an idle page is idle: every idle page can
    be evicted, the last of a prefix first. Who sets `touched` to a set finds there the hashes of
    pages that have come or left since.
    """

    def __init__(
        self,
        pool: PagePool,
        geometry: PageGeometry,
        order: EvictionOrder[Evictable],
        costs: CostModel,
        owners: PrefixOwners,
    ) -> None:
        self._pool = pool
        self._geometry = geometry
        self._order = order
        self._costs = costs
        self._owners = owners
        self._pages: dict[bytes, CachedPage] = {}
        self._of_adapter: dict[AdapterKey, dict[CachedPage, None]] = {}
        self._dropped: set[CachedPage] = set()
        self._num_idle_pages = 0
        self.touched: set[bytes] | None = None
        self.total_evicted_pages = 0
        self.total_hit_tokens = 0
        self.total_asked_tokens = 0

    @property
    def num_pages(self) -> int:
        """Pages of cached prefixes, with those that were dropped and are still in use."""
        return self._pool.num_owned("prefix")

    @property
    def num_idle_pages(self) -> int:
        """Pages that no sequence uses; eviction can free all of them."""
        return self._num_idle_pages

    @property
    def num_used_pages(self) -> int:
        """Pages that sequences use, with those that were dropped."""
        return self.num_pages - self._num_idle_pages

    def has(self, digest: bytes) -> bool:
        """Whether sequences that come now would find that page."""
        return digest in self._pages

    def digests(self) -> Iterable[bytes]:
        """Hashes of the pages that sequences which come now would find."""
        return self._pages.keys()

    def begin(
        self, token_ids: Sequence[int], salt: PrefixSalt, max_tokens: int
    ) -> list[CachedPage]:
        """Find and use the longest cached prefix of at most `max_tokens` tokens, in whole pages."""
        size = self._geometry.page_tokens
        chain: list[CachedPage] = []
        for index in range(min(max_tokens, len(token_ids)) // size):
            tokens = token_ids[index * size : (index + 1) * size]
            page = self._pages.get(self._next_digest(chain, salt, tokens))
            if page is None:
                break
            self._use(page)
            chain.append(page)
        return chain

    def count_start(self, num_tokens: int, chain: Sequence[CachedPage]) -> None:
        """A sequence of `num_tokens` tokens starts with these cached pages."""
        self.total_asked_tokens += num_tokens
        self.total_hit_tokens += len(chain) * self._geometry.page_tokens

    def extend(
        self, chain: list[CachedPage], salt: PrefixSalt, token_ids: Sequence[int], held: HeldPage
    ) -> bool:
        """Cache the page of `token_ids` that comes after `chain`, and append it there, in use.

        Where that prefix is cached already the page that is there is appended: the sequence keeps
        its own, and what it computes next hangs below the cached one. False, and nothing is
        cached, if the prefix or an adapter of it has been dropped.
        """
        begin = len(chain) * self._geometry.page_tokens
        keys = salt.keys_of(begin + self._geometry.page_tokens)
        if chain and chain[-1].is_dropped:
            return False
        if not all(self._owners.accepts_prefixes(key) for key in keys):
            return False
        digest = self._next_digest(chain, salt, token_ids)
        page = self._pages.get(digest)
        if page is None:
            page = self._add(digest, chain[-1] if chain else None, keys, held)
        self._use(page)
        chain.append(page)
        return True

    def release(self, chain: Iterable[CachedPage], was_used: bool) -> None:
        """Take back one use of each page; the last of the prefix must come first.

        A use counts when it ends; not if the sequence could not start (`was_used` is False).
        """
        for page in chain:
            assert page.num_users > 0, "release of a prefix page that nobody uses"
            if was_used:
                self._order.touch(page.digest)
            page.num_users -= 1
            if page.num_users > 0:
                continue
            if page.is_dropped:
                self._dropped.remove(page)
                self._pool.free(_owner(page.page))
            else:
                self._num_idle_pages += 1
                self._offer(page)
            for key in page.keys:
                self._owners.count_prefix_pages(key, -page.is_dropped, -1)

    def evict(self, digest: bytes) -> None:
        """Free an idle page that nothing follows."""
        page = self._pages[digest]
        assert page.num_users == page.num_children == 0, "eviction of a prefix page in use"
        self._drop([page])
        self.total_evicted_pages += 1

    def evict_last_of(self, key: AdapterKey) -> bool:
        """Free the page that the adapter made last, which nothing follows; none of its pages may be
        in use. False if it has none."""
        if key not in self._of_adapter:
            return False
        self.evict(next(reversed(self._of_adapter[key])).digest)
        return True

    def drop_adapter(self, key: AdapterKey) -> None:
        """Forget every page that the adapter made: nobody finds them any more, idle ones are free
        now, the others when their sequences end."""
        self._drop(list(self._of_adapter.get(key, ())))

    def num_pages_by_adapter(self) -> dict[AdapterKey, tuple[int, int]]:
        """Pages that each adapter made, and how many of them are in use."""
        counts: dict[AdapterKey, tuple[int, int]] = {}
        for page in (*self._pages.values(), *self._dropped):
            for key in page.keys:
                num_cached, num_used = counts.get(key, (0, 0))
                counts[key] = num_cached + 1, num_used + (page.num_users > 0)
        return counts

    def check(self) -> int:
        """Assert that users, children and owners are counted right, and that the order has exactly
        the idle pages that nothing follows; returns how many those are."""
        children: dict[bytes, int] = {}
        for page in self._pages.values():
            if page.parent is not None:
                assert self._pages.get(page.parent.digest) is page.parent, "a page without parent"
                assert page.parent.num_users >= page.num_users, "a used page below an idle one"
                children[page.parent.digest] = children.get(page.parent.digest, 0) + 1
        num_leaves = 0
        for digest, page in self._pages.items():
            assert not page.is_dropped
            assert page.num_children == children.get(digest, 0)
            may_leave = page.num_users == page.num_children == 0
            assert (digest in self._order) == may_leave
            num_leaves += may_leave
            assert self._pool.pages_of(_owner(page.page)) == [page.page]
        assert self._num_idle_pages == sum(not page.num_users for page in self._pages.values())
        assert all(page.num_users for page in self._dropped), "a dropped page that nobody uses"
        assert self.num_pages == len(self._pages) + len(self._dropped)
        tagged = {(key, page) for page in self._pages.values() for key in page.keys}
        assert tagged == {(key, page) for key, own in self._of_adapter.items() for page in own}
        assert all(self._of_adapter.values()), "an adapter without pages is remembered"
        return num_leaves

    def _next_digest(
        self, chain: Sequence[CachedPage], salt: PrefixSalt, token_ids: Sequence[int]
    ) -> bytes:
        """Hash of the page of `token_ids` after `chain`."""
        assert len(token_ids) == self._geometry.page_tokens
        parent = chain[-1].digest if chain else _ROOT
        return _page_digest(parent, salt, token_ids, len(chain) * len(token_ids))

    def _add(
        self, digest: bytes, parent: CachedPage | None, keys: tuple[AdapterKey, ...], held: HeldPage
    ) -> CachedPage:
        """A new page, idle until it is used."""
        self._pool.transfer(held.page, held.owner, _owner(held.page))
        index = 0 if parent is None else parent.index + 1
        page = CachedPage(held.page, digest, index, parent, keys)
        self._pages[digest] = page
        self._touch(digest)
        self._num_idle_pages += 1
        if parent is not None:
            parent.num_children += 1
        for key in keys:
            self._of_adapter.setdefault(key, {})[page] = None
            self._owners.count_prefix_pages(key, 1, 0)
        return page

    def _use(self, page: CachedPage) -> None:
        page.num_users += 1
        if page.num_users == 1:
            self._order.withdraw(page.digest)
            self._num_idle_pages -= 1
            for key in page.keys:
                self._owners.count_prefix_pages(key, 0, 1)

    def _drop(self, pages: Sequence[CachedPage]) -> None:
        """Take pages out of the tree; with a page of an adapter all that follow it, since those
        are of the same adapter. Idle ones are freed."""
        for page in pages:
            page.is_dropped = True
            del self._pages[page.digest]
            self._touch(page.digest)
            self._order.forget(page.digest)
        for page in pages:
            if page.parent is not None:
                page.parent.num_children -= 1
                self._offer(page.parent)
            for key in page.keys:
                del self._of_adapter[key][page]
                if not self._of_adapter[key]:
                    del self._of_adapter[key]
            if page.num_users:
                self._dropped.add(page)
                continue
            self._num_idle_pages -= 1
            self._pool.free(_owner(page.page))
            for key in page.keys:
                self._owners.count_prefix_pages(key, -1, 0)

    def _offer(self, page: CachedPage) -> None:
        """Let the page leave if it may."""
        if page.num_users or page.num_children or page.is_dropped:
            return
        size = self._geometry.page_tokens
        cost_s = self._costs.prefix_page_s(size, page.index * size)
        self._order.offer(page.digest, cost_s, self._geometry.page_bytes)

    def _touch(self, digest: bytes) -> None:
        if self.touched is not None:
            self.touched.add(digest)


def prefix_digests(token_ids: Sequence[int], salt: PrefixSalt, page_tokens: int) -> Iterator[bytes]:
    """Hashes of the full pages of a prompt, as caches of any engine name them."""
    digest = _ROOT
    for begin in range(0, len(token_ids) - page_tokens + 1, page_tokens):
        digest = _page_digest(digest, salt, token_ids[begin : begin + page_tokens], begin)
        yield digest


def _page_digest(parent: bytes, salt: PrefixSalt, token_ids: Sequence[int], begin: int) -> bytes:
    """Hash of the page of `token_ids`, the first of which is the `begin`-th of its prompt: parent,
    tag (none or HASH_BYTES), tokens.

    The tokens of a page are equally many everywhere, so the parts cannot run together.
    """
    tag = salt.tag_of(begin, begin + len(token_ids))
    parts = parent + tag + array("q", token_ids).tobytes()
    return blake2b(parts, digest_size=HASH_BYTES).digest()


def _owner(page: int) -> Owner:
    """An owner for each page, so that it goes back alone; unlike its hash, a page is unique among
    those that were dropped too."""
    return Owner("prefix", str(page))
