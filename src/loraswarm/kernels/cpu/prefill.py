"""Low-rank updates of segments with many tokens, as matrix products in torch.

Takes the segments that the kernels of shrink and expand skip, after those have checked the table.
Called by kernels/cpu/lora.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, TileTable


def shrink_long(
    x_TI: Tensor, h_QTR: Tensor, pool: Tensor, tiles: TileTable, first_site: int, max_tokens: int
) -> None:
    """`kernels.reference.lora_shrink` into `h_QTR`, for segments of more than `max_tokens`."""
    for segment, begin, end in _long_segments(tiles, max_tokens):
        x_wide_TI = x_TI[begin:end].float()
        for part in range(h_QTR.shape[0]):
            for tile, column in _tiles_of(tiles, first_site + part, segment):
                a_RI = _rows(pool, tiles.a_offset, tiles.ranks, tile, x_TI.shape[1])
                h_QTR[part, begin:end, column : column + a_RI.shape[0]] = x_wide_TI @ a_RI.T


def expand_long_(
    y_TO: Tensor,
    h_QTR: Tensor,
    pool: Tensor,
    tiles: TileTable,
    site_bounds: tuple[int, tuple[int, ...]],
    max_tokens: int,
) -> None:
    """`kernels.reference.lora_expand_`, for segments of more than `max_tokens`.

    `site_bounds` is (first_site, out_bounds).
    """
    first_site, out_bounds = site_bounds
    for segment, begin, end in _long_segments(tiles, max_tokens):
        for part in range(h_QTR.shape[0]):
            low, high = out_bounds[part], out_bounds[part + 1]
            delta_TO = torch.zeros(end - begin, high - low)
            for tile, column in _tiles_of(tiles, first_site + part, segment):
                bt_RO = _rows(pool, tiles.bt_offset, tiles.ranks, tile, high - low)
                h_TR = h_QTR[part, begin:end, column : column + bt_RO.shape[0]]
                delta_TO.addmm_(h_TR, bt_RO, alpha=float(tiles.scale[tile]))
            y_part = y_TO[begin:end, low:high]
            y_part.copy_(y_part.float() + delta_TO)


def _long_segments(tiles: TileTable, max_tokens: int) -> Iterator[tuple[int, int, int]]:
    """(segment, first token, end token) of each segment of more than `max_tokens` tokens."""
    starts = tiles.segments.tolist()
    for segment, (begin, end) in enumerate(pairwise(starts)):
        if end - begin > max_tokens:
            yield segment, begin, end


def _tiles_of(tiles: TileTable, site: int, segment: int) -> Iterator[tuple[int, int]]:
    """(tile, first column of h) of each tile that a segment runs at a site."""
    first, last = tiles.ranges[site, segment].tolist()
    for tile in range(first, last):
        yield tile, MAX_TILE_RANKS * (tile - first)


def _rows(pool: Tensor, offset: Tensor, ranks: Tensor, tile: int, width: int) -> Tensor:
    first, num_rows = int(offset[tile]), int(ranks[tile])
    return pool[first : first + num_rows * width].view(num_rows, width).float()
