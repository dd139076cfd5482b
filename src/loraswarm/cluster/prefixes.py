"""Which replica has which page of which prompt in its prefix cache, as far as it was reported.

Computes the hashes that the engines' caches name pages by. A page that is not known here costs a
prefill, never a wrong answer: an engine looks at its own cache. Told by residency; asked by the
front before it routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraswarm.core.client import AdapterSummary
from loraswarm.core.request import Request
from loraswarm.core.residency_report import ResidencyReport, join_pages, page_ids
from loraswarm.core.sequence import AdapterMix
from loraswarm.memory.prefix_cache import PrefixSalt, prefix_digests

MAX_PAGES = 1_000_000
"""About 200 bytes each."""


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """Where the beginning of one prompt is cached: `pages` of it, in order, up to the last that
    some replica has. A `KnownPrefix` of routing."""

    index: PrefixIndex
    pages: tuple[int, ...]

    def tokens_at(self, replica_id: str) -> int:
        """Tokens of the prompt in cached pages there, from the first on without a gap."""
        held = self.index.pages_of(replica_id)
        num_pages = 0
        for page in self.pages:
            if page not in held:
                break
            num_pages += 1
        return num_pages * self.index.page_tokens

    def best_replicas(self) -> Sequence[str]:
        """Those that have the last of the pages, and with it, as caches are, all before it."""
        return self.index.holders_of(self.pages[-1]) if self.pages else ()


class PrefixIndex:
    """Reported pages by replica, and replicas by page, `max_pages` in all.

    Each replica may have an equal share of them; what it reports beyond that is not remembered, and
    counted in `num_left_out`.
    """

    def __init__(self, page_tokens: int, max_pages: int = MAX_PAGES) -> None:
        self.page_tokens = page_tokens
        self.num_left_out = 0
        self._max_pages = max_pages
        self._pages: dict[str, set[int]] = {}
        self._holders: dict[int, tuple[str, ...]] = {}

    @property
    def num_pages(self) -> int:
        """Remembered, those of every replica counted."""
        return sum(len(pages) for pages in self._pages.values())

    def apply(self, replica_id: str, report: ResidencyReport) -> None:
        """Enter the pages of a report that follows those entered before, or is full."""
        if report.is_full:
            self.forget(replica_id)
        pages = self._pages.setdefault(replica_id, set())
        for page in page_ids(report.removed_pages):
            self._remove(replica_id, page)
        room = self._max_pages // len(self._pages)
        for page in page_ids(report.added_pages):
            if page in pages:
                continue
            if len(pages) >= room:
                self.num_left_out += 1
                continue
            pages.add(page)
            self._holders[page] = (*self._holders.get(page, ()), replica_id)

    def forget(self, replica_id: str) -> None:
        """The replica has none of what it had."""
        for page in tuple(self._pages.get(replica_id, ())):
            self._remove(replica_id, page)
        self._pages.pop(replica_id, None)

    def find(self, token_ids: Sequence[int], mix: AdapterMix) -> FoundPrefix:
        """Where the pages of a prompt are that `mix` computes from its first token on.

        An activated LoRA's prompt begins with pages of the base, which are not found with its mix.
        Cost      a hash a page, up to the first that nobody has.
        """
        found: list[int] = []
        for digest in prefix_digests(token_ids, PrefixSalt(mix), self.page_tokens):
            (page,) = page_ids(join_pages([digest]))
            if page not in self._holders:
                break
            found.append(page)
        return FoundPrefix(self, tuple(found))

    def find_for(self, request: Request, adapters: Mapping[str, AdapterSummary]) -> FoundPrefix:
        """`find` for a request, by the catalog that the replicas share; nothing is found while the
        content of an adapter is not known there."""
        names = [name for name, _ in request.weighted_adapters]
        if any(name not in adapters or not adapters[name].digest for name in names):
            return FoundPrefix(self, ())
        mix = tuple(
            ((name, adapters[name].digest), float(weight))
            for name, weight in request.weighted_adapters
        )
        return self.find(request.prompt_token_ids, mix)

    def pages_of(self, replica_id: str) -> set[int] | frozenset[int]:
        """Read only."""
        return self._pages.get(replica_id, frozenset())

    def holders_of(self, page: int) -> tuple[str, ...]:
        """Replicas that have the page, in the order in which they said so."""
        return self._holders.get(page, ())

    def _remove(self, replica_id: str, page: int) -> None:
        """Nothing happens if the page was left out."""
        pages = self._pages[replica_id]
        if page not in pages:
            return
        pages.remove(page)
        holders = tuple(each for each in self._holders[page] if each != replica_id)
        if holders:
            self._holders[page] = holders
        else:
            del self._holders[page]
