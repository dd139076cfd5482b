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
                rows = int(tiles.a_offset[tile]), int(tiles.a_stride[tile])
                a_RI = _rows(pool, rows, int(tiles.ranks[tile]), x_TI.shape[1])
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
        for part, (low, high) in enumerate(pairwise(out_bounds)):
            gain_at, constant_at = tiles.gain_offset[first_site + part, segment].tolist()
            tile_columns = list(_tiles_of(tiles, first_site + part, segment))
            if not tile_columns and gain_at < 0 and constant_at < 0:
                continue
            y_part = y_TO[begin:end, low:high]
            sum_TO = torch.zeros(end - begin, high - low)
            for tile, column in tile_columns:
                bt_RO = _scaled_bt(pool, tiles, tile, high - low)
                h_TR = h_QTR[part, begin:end, column : column + bt_RO.shape[0]]
                sum_TO.addmm_(h_TR, bt_RO, alpha=float(tiles.scale[tile]))
            sum_TO += y_part
            if gain_at >= 0:
                sum_TO *= _vector(pool, gain_at, high - low)
            if constant_at >= 0:
                sum_TO += _vector(pool, constant_at, high - low)
            y_part.copy_(sum_TO)


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


def _scaled_bt(pool: Tensor, tiles: TileTable, tile: int, width: int) -> Tensor:
    """Bt of a tile with its u and v multiplied in: fewer products than in h and y."""
    ranks, u_at, v_at = int(tiles.ranks[tile]), int(tiles.u_offset[tile]), int(tiles.v_offset[tile])
    rows = int(tiles.bt_offset[tile]), int(tiles.bt_stride[tile])
    bt_RO = _rows(pool, rows, ranks, width)
    if u_at >= 0:
        bt_RO = bt_RO * _vector(pool, u_at, ranks)[:, None]
    if v_at >= 0:
        bt_RO = bt_RO * _vector(pool, v_at, width)
    return bt_RO


def _rows(pool: Tensor, rows: tuple[int, int], ranks: int, width: int) -> Tensor:
    """The first `width` columns of a tile's rows; `rows` is their offset and stride."""
    first, stride = rows
    end = first + (ranks - 1) * stride + width
    return pool[first:end].as_strided((ranks, width), (stride, 1)).float()


def _vector(pool: Tensor, offset: int, size: int) -> Tensor:
    return pool.view(torch.float32)[offset : offset + size]
