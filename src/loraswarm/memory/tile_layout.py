"""Where each tile of an adapter goes within its pages. Pure arithmetic, no torch.

An adapter's module of rank r is cut into tiles of at most 16 ranks; a tile's A rows and Bt rows are
two blocks, each contiguous inside one page. Blocks are packed first-fit, largest first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from loraswarm.core.base_shape import TARGETS, BaseShape
from loraswarm.memory.geometry import TILE_RANKS, PageGeometry

SiteRank = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TilePlace:
    """One tile: `num_ranks` ranks from `first_rank` of the module at `site`.

    A and Bt start at these elements of the adapter's `a_page`-th and `bt_page`-th page.
    """

    site: int
    first_rank: int
    num_ranks: int
    a_page: int
    a_element: int
    bt_page: int
    bt_element: int


@dataclass(frozen=True, slots=True)
class TileLayout:
    """All tiles of one adapter, ordered by site and rank, over `num_pages` pages."""

    num_pages: int
    tiles: tuple[TilePlace, ...]


@lru_cache(maxsize=256)
def tile_layout(
    site_ranks: tuple[SiteRank, ...], shape: BaseShape, geometry: PageGeometry
) -> TileLayout:
    """Pack an adapter whose module at each site has the given rank; adapters alike share a layout.

    Cost    O(tiles log tiles).
    """
    cuts = [
        (site, first, min(TILE_RANKS, rank - first))
        for site, rank in sorted(site_ranks)
        for first in range(0, rank, TILE_RANKS)
    ]
    sizes: list[int] = []
    for site, _, num_ranks in cuts:
        in_size, out_size = shape.target_sizes[site % len(TARGETS)]
        sizes += [num_ranks * in_size, num_ranks * out_size]
    places, num_pages = _pack(sizes, geometry)
    tiles = tuple(
        TilePlace(*cut, *a_place, *bt_place)
        for cut, a_place, bt_place in zip(cuts, places[::2], places[1::2], strict=True)
    )
    return TileLayout(num_pages, tiles)


def _pack(sizes: Iterable[int], geometry: PageGeometry) -> tuple[list[tuple[int, int]], int]:
    """First-fit decreasing: (page, element) of each block as given, and the number of pages."""
    align = geometry.alignment_elements
    rounded = [-(-size // align) * align for size in sizes]
    order = sorted(range(len(rounded)), key=lambda index: -rounded[index])
    used: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(rounded)
    page, last_size = 0, None
    for index in order:
        size = rounded[index]
        if size != last_size:
            page, last_size = 0, size
        while page < len(used) and used[page] + size > geometry.page_elements:
            page += 1
        if page == len(used):
            used.append(0)
        places[index] = (page, used[page])
        used[page] += size
    return places, len(used)
