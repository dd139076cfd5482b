"""Pages that several holders share: who has which extent of them, and where gaps are. No torch.

Keeps small remainders of adapters from taking a page each. Does not take pages from the pool or
give them back; AdapterPages does, and is the only caller.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

Bins = Sequence[Sequence[int]]


class Extent(NamedTuple):
    """Elements `begin : begin + size` of a page; in a plan a page below 0 is yet to be taken."""

    page: int
    begin: int
    size: int


class Gap(NamedTuple):
    """Free elements of a page."""

    begin: int
    size: int

    @property
    def end(self) -> int:
        return self.begin + self.size


@dataclass(frozen=True, slots=True)
class ShelfPlan:
    """Where extents would go; pages -1, -2, ... -num_new_pages stand for new ones."""

    extents: Mapping[str, tuple[Extent, ...]]
    num_new_pages: int


class Shelves:
    """Shared pages of `page_elements` elements, filled first-fit, oldest page first.

        page 7   | extent of a | extent of b | gap | extent of a | gap .................. |
        page 3   | extent of c | gap ..................................................... |

    Extents and gaps cover a page without overlap, gaps never touch, and a page without extents is
    given up. An extent belongs to one holder.
    """

    def __init__(self, page_elements: int) -> None:
        self._page_elements = page_elements
        self._gaps: dict[int, list[Gap]] = {}
        self._extents: dict[str, tuple[Extent, ...]] = {}

    @property
    def pages(self) -> set[int]:
        return set(self._gaps)

    def extents_of(self, holder: str) -> tuple[Extent, ...]:
        """In the order of the bins they came from; none if the holder has none."""
        return self._extents.get(holder, ())

    def plan(self, wanted: Mapping[str, Bins]) -> ShelfPlan:
        """Find room for extents of these sizes by holder; changes nothing.

        The extents of one bin fit a page together. They go to one page or to two, of which at most
        one is new: how many pages a holder keeps from others is bounded, whatever gaps there are.
        """
        smallest = min((min(sizes) for bins in wanted.values() for sizes in bins), default=0)
        gaps = {
            page: list(page_gaps)
            for page, page_gaps in self._gaps.items()
            if any(gap.size >= smallest for gap in page_gaps)
        }
        num_new_pages = 0
        extents: dict[str, tuple[Extent, ...]] = {}
        for holder, bins in wanted.items():
            found: list[Extent] = []
            for sizes in bins:
                new_page = -num_new_pages - 1
                found += _place_bin(gaps, sizes, new_page, self._page_elements)
                num_new_pages += new_page in gaps
            extents[holder] = tuple(found)
        return ShelfPlan(extents, num_new_pages)

    def commit(self, plan: ShelfPlan, new_pages: Sequence[int]) -> None:
        """Carry out a plan made since the last change, with the pages it needs."""
        assert len(new_pages) == plan.num_new_pages
        for page in new_pages:
            self._gaps[page] = [Gap(0, self._page_elements)]
        for holder, planned in plan.extents.items():
            assert holder not in self._extents, f"{holder} has extents already"
            extents = tuple(
                extent if extent.page >= 0 else extent._replace(page=new_pages[-1 - extent.page])
                for extent in planned
            )
            for extent in extents:
                self._fill(extent)
            if extents:
                self._extents[holder] = extents

    def release(self, holder: str) -> list[int]:
        """Take the holder's extents back; returns the pages that are empty now and given up."""
        empty = []
        for page, begin, size in self._extents.pop(holder, ()):
            gaps = self._gaps[page]
            index = bisect(gaps, Gap(begin, 0))
            end = begin + size
            if index < len(gaps) and gaps[index].begin == end:
                end += gaps.pop(index).size
            if index > 0 and gaps[index - 1].end == begin:
                index -= 1
                begin = gaps.pop(index).begin
            gaps.insert(index, Gap(begin, end - begin))
            if gaps[0].size == self._page_elements:
                del self._gaps[page]
                empty.append(page)
        return empty

    def check(self, holders: Iterable[str]) -> None:
        """Assert that pages are covered once, and that these holders and no others have extents."""
        assert self._extents.keys() <= set(holders), "an extent of a holder that is gone"
        covered: dict[int, list[tuple[int, int, bool]]] = {page: [] for page in self._gaps}
        for extents in self._extents.values():
            for page, begin, size in extents:
                covered[page].append((begin, begin + size, False))
        for page, gaps in self._gaps.items():
            assert covered[page], f"page {page} is shared by nobody"
            spans = sorted(covered[page] + [(gap.begin, gap.end, True) for gap in gaps])
            assert spans[0][0] == 0, f"page {page} is not covered from its start"
            assert spans[-1][1] == self._page_elements, f"page {page} is not covered to its end"
            for left, right in pairwise(spans):
                assert left[1] == right[0], f"page {page}: {left} and {right} overlap or part"
                assert not (left[2] and right[2]), f"page {page}: gaps {left} and {right} touch"

    def _fill(self, extent: Extent) -> None:
        """Take an extent out of the gap it was planned in."""
        gaps = self._gaps[extent.page]
        index = bisect(gaps, Gap(extent.begin, self._page_elements)) - 1
        assert gaps[index].begin == extent.begin, "the shelves changed since the plan"
        _shrink(gaps, index, extent.size)


def _place_bin(
    gaps: dict[int, list[Gap]], sizes: Sequence[int], new_page: int, page_elements: int
) -> list[Extent]:
    """Take room for a bin out of `gaps`: on one page if one has it, else what fits the page with
    the most room and the rest on another; `new_page` is opened where no other has room."""
    whole = _try_take_whole(gaps, sizes)
    if whole is not None:
        return whole
    first: list[Extent | None] = [None] * len(sizes)
    if gaps:
        roomiest = max(gaps, key=lambda page: sum(gap.size for gap in gaps[page]))
        first, gaps[roomiest] = _take_what_fits(roomiest, gaps[roomiest], sizes)
    rest = [size for size, extent in zip(sizes, first, strict=True) if extent is None]
    second = _try_take_whole(gaps, rest)
    if second is None:
        gaps[new_page] = [Gap(0, page_elements)]
        second = _try_take_whole(gaps, rest)
        assert second is not None, "a bin is larger than a page"
    left = iter(second)
    return [extent if extent is not None else next(left) for extent in first]


def _try_take_whole(gaps: dict[int, list[Gap]], sizes: Sequence[int]) -> list[Extent] | None:
    """Room for all of `sizes` on the first page that has it, taken out of `gaps`."""
    for page, page_gaps in gaps.items():
        if sum(gap.size for gap in page_gaps) < sum(sizes):
            continue
        extents, left = _take_what_fits(page, page_gaps, sizes)
        found = [extent for extent in extents if extent is not None]
        if len(found) == len(sizes):
            gaps[page] = left
            return found
    return None


def _take_what_fits(
    page: int, gaps: Sequence[Gap], sizes: Sequence[int]
) -> tuple[list[Extent | None], list[Gap]]:
    """First-fit of each size into the page's gaps; the extents, None where none fits, and what is
    left of the gaps."""
    left = list(gaps)
    extents: list[Extent | None] = []
    for size in sizes:
        index = next((i for i, gap in enumerate(left) if gap.size >= size), None)
        if index is None:
            extents.append(None)
            continue
        extents.append(Extent(page, left[index].begin, size))
        _shrink(left, index, size)
    return extents, left


def _shrink(gaps: list[Gap], index: int, size: int) -> None:
    """Take `size` elements from the front of a gap."""
    begin, room = gaps[index]
    assert room >= size, "the shelves changed since the plan"
    if room == size:
        del gaps[index]
    else:
        gaps[index] = Gap(begin + size, room - size)
