"""Which page is free and who owns it: integers only, no tensors, no torch.

The one place that knows the owner of a page. KVCache, PrefixCache and AdapterPages take and return
pages here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from loraswarm.errors import OutOfPages

OwnerKind = Literal["kv", "prefix", "adapter"]


class Owner(NamedTuple):
    """Who holds pages: a sequence's K/V (its request id), a cached prefix or an adapter."""

    kind: OwnerKind
    name: str


class PagePool:
    """`num_pages` pages of `page_bytes` each; every page is free or has exactly one owner."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        assert num_pages > 0
        assert page_bytes > 0
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned: dict[Owner, list[int]] = {}
        self._num_owned: dict[OwnerKind, int] = {"kv": 0, "prefix": 0, "adapter": 0}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def require(self, num_pages: int) -> None:
        """Raise OutOfPages unless `num_pages` are free; for what takes pages in several parts."""
        if num_pages > len(self._free):
            raise OutOfPages(num_pages, len(self._free), self._largest_owners())

    def allocate(self, num_pages: int, owner: Owner) -> list[int]:
        """Take pages from the pool: all of them, or none. Returns the new pages in order.

        Pages are not cleared and belong to `owner`, after those it already has, until `free`.
        Cost     O(num_pages), host only; never waits for the device.
        Raises   OutOfPages: the pool is unchanged, so the caller can evict and retry.
        Source   one pool for KV and adapter weights: S-LoRA (Sheng et al. 2023), unified paging;
                 here pages are bytes: adapter rows and KV rows differ in width when K < H.
        """
        assert num_pages >= 0
        self.require(num_pages)
        if num_pages == 0:
            return []
        taken = self._free[-num_pages:][::-1]
        del self._free[-num_pages:]
        self._owned.setdefault(owner, []).extend(taken)
        self._num_owned[owner.kind] += num_pages
        return taken

    def transfer(self, page: int, owner: Owner, new_owner: Owner) -> None:
        """Make a page of `owner` one of `new_owner`, after those it already has."""
        pages = self._owned[owner]
        pages.remove(page)
        if not pages:
            del self._owned[owner]
        self._owned.setdefault(new_owner, []).append(page)
        self._num_owned[owner.kind] -= 1
        self._num_owned[new_owner.kind] += 1

    def free(self, owner: Owner) -> int:
        """Give back every page of `owner`; returns how many there were (0 if it had none)."""
        pages = self._owned.pop(owner, [])
        self._free.extend(reversed(pages))
        self._num_owned[owner.kind] -= len(pages)
        return len(pages)

    def pages_of(self, owner: Owner) -> list[int]:
        """The owner's pages in the order they were taken. Read only: the list is the pool's own."""
        return self._owned.get(owner, [])

    def num_owned(self, kind: OwnerKind) -> int:
        """Pages held by all owners of one kind."""
        return self._num_owned[kind]

    def check(self) -> None:
        """Assert conservation: free + owned = all pages, no page twice, and kinds counted right."""
        held = [page for pages in self._owned.values() for page in pages]
        assert sorted(held + self._free) == list(range(self.num_pages)), "page lost or doubled"
        for kind, count in self._num_owned.items():
            pages_of_kind = [
                len(pages) for owner, pages in self._owned.items() if owner.kind == kind
            ]
            assert count == sum(pages_of_kind), f"{count} pages of {kind}"

    def _largest_owners(self) -> str:
        largest = sorted(self._owned.items(), key=lambda item: -len(item[1]))[:3]
        return ", ".join(f"{owner.kind} {owner.name} {len(pages)}" for owner, pages in largest)
