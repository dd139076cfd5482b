"""How blocks of elements go into pages: whole pages where they fill them, small extents elsewhere.

Pure arithmetic, no torch; does not know what a block holds. Called by the layouts; AdapterPages
takes the pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraswarm.memory.geometry import PageGeometry

Place = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Blocks in pieces, each contiguous: whole pages first, then extents, which share pages.

        piece       0        1              num_pages    + 1
                | page   | page   | ... | extent     | extent | ...
                ^ block  ^ block        ^ block

    Block b begins at element `places[b][1]` of piece `places[b][0]`. `bins` has the sizes of
    extents; those of one bin fit one page together, and are never spread over more than two.
    `num_elements` counts blocks, each aligned.
    """

    num_pages: int
    bins: tuple[tuple[int, ...], ...]
    places: tuple[Place, ...]
    num_elements: int

    @property
    def max_pages(self) -> int:
        """The most pages it has a part in, whatever gaps in shared pages it goes to."""
        return self.num_pages + sum(min(len(extents), 2) for extents in self.bins)


def pack(sizes: Iterable[int], geometry: PageGeometry) -> Packing:
    """Pack blocks of these many elements, none larger than a page; each begins aligned.

    Semantics    first-fit decreasing into pages; what fills 7/8 of a page or more keeps it, the
                 rest becomes extents of at most a sixteenth of a page, or of one block.
    Cost         O(blocks log blocks), and pages for each distinct size.
    """
    align = geometry.alignment_elements
    rounded = [-(-size // align) * align for size in sizes]
    assert max(rounded, default=0) <= geometry.page_elements, "a block is larger than a page"
    bins = _first_fit(rounded, geometry.page_elements)
    well_filled: list[list[int]] = []
    rest: list[list[int]] = []
    for blocks in bins:
        used = sum(rounded[block] for block in blocks)
        (well_filled if 8 * used >= 7 * geometry.page_elements else rest).append(blocks)
    cuts = [_cut(blocks, rounded, geometry.page_elements // 16) for blocks in rest]
    places: list[Place] = [(0, 0)] * len(rounded)
    pieces = well_filled + [extent for extents in cuts for extent in extents]
    for piece, blocks in enumerate(pieces):
        element = 0
        for block in blocks:
            places[block] = piece, element
            element += rounded[block]
    extent_sizes = tuple(
        tuple(sum(rounded[block] for block in extent) for extent in extents) for extents in cuts
    )
    return Packing(len(well_filled), extent_sizes, tuple(places), sum(rounded))


def _first_fit(sizes: Sequence[int], page_elements: int) -> list[list[int]]:
    """First-fit decreasing: which blocks go into each page."""
    order = sorted(range(len(sizes)), key=lambda block: -sizes[block])
    bins: list[list[int]] = []
    used: list[int] = []
    page, last_size = 0, None
    for block in order:
        size = sizes[block]
        if size != last_size:
            page, last_size = 0, size
        while page < len(used) and used[page] + size > page_elements:
            page += 1
        if page == len(used):
            bins.append([])
            used.append(0)
        bins[page].append(block)
        used[page] += size
    return bins


def _cut(blocks: Iterable[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Runs of blocks of at most `limit` elements together, or of one block."""
    runs: list[list[int]] = []
    room = 0
    for block in blocks:
        if not runs or sizes[block] > room:
            runs.append([])
            room = limit
        runs[-1].append(block)
        room -= sizes[block]
    return runs
