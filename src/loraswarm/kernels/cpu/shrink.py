"""The shrink kernel: each row of A is read once for all tokens of its segment.

Four rows and four tokens share each load. Called by kernels/cpu/lora only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.cpu.jit import add_atomically, called, inlined, kernel
from loraswarm.kernels.cpu.tiles import (
    Limits,
    TileArrays,
    ceil_divide,
    check_tiles,
    first_items,
    locate,
)
from loraswarm.kernels.cpu.vectors import load, load_part, multiply_add, total, zeros

LANES = 16
PIECE_ROWS = 4


@kernel
def shrink(x_TI: Any, h_QTR: Any, tiles: TileArrays, limits: Limits) -> None:
    """`kernels.reference.lora_shrink` into `h_QTR`, for the segments within `limits`."""
    first_item, next_item = _count_items(h_QTR, tiles, limits)
    for _ in prange(limits.num_threads):
        _shrink_items(x_TI, h_QTR, tiles, first_item, next_item)


@called
def _count_items(h_QTR: Any, tiles: TileArrays, limits: Limits) -> Any:
    check_tiles(tiles, h_QTR)
    num_parts, num_segments = tiles.ranges.shape[:2]
    pieces_U = np.zeros(num_parts * num_segments, np.int64)
    for unit in range(pieces_U.size):
        part, segment = divmod(unit, num_segments)
        for tile in range(tiles.ranges[part, segment, 0], tiles.ranges[part, segment, 1]):
            pieces_U[unit] += ceil_divide(tiles.ranks[tile], PIECE_ROWS)
    return first_items(tiles, pieces_U, limits.max_tokens), np.zeros(1, np.int64)


@called
def _shrink_items(
    x_TI: Any, h_QTR: Any, tiles: TileArrays, first_item: Any, next_item: Any
) -> None:
    """One thread's share: items until none is left."""
    item = add_atomically(next_item, 0, 1)
    while item < first_item[-1]:
        part, segment, piece, begin, end = locate(item, tiles, first_item)
        first_tile = tiles.ranges[part, segment, 0]
        tile = first_tile
        while piece >= ceil_divide(tiles.ranks[tile], PIECE_ROWS):
            piece -= ceil_divide(tiles.ranks[tile], PIECE_ROWS)
            tile += 1
        row = piece * PIECE_ROWS
        a_offset = tiles.offset[tile] + row * x_TI.shape[1]
        column = (tile - first_tile) * MAX_TILE_RANKS + row
        num_rows = min(tiles.ranks[tile] - row, PIECE_ROWS)
        h_TR = h_QTR[part, begin:end, column : column + num_rows]
        _shrink_rows(x_TI[begin:end], h_TR, tiles.pool, a_offset)
        item = add_atomically(next_item, 0, 1)


@called
def _shrink_rows(x_TI: Any, h_TR: Any, pool: Any, a_offset: int) -> None:
    """h = x @ A.T for up to four rows of A, four tokens at a time.

    What is missing to four repeats the last row or token and is not stored; a token's sum does not
    depend on its neighbours.
    """
    num_tokens, width = x_TI.shape
    zero = zeros(LANES)
    a_starts = _starts4(a_offset, 0, h_TR.shape[1], width)
    if num_tokens == 1:
        _store_totals(h_TR, 0, _dot_rows(zero, pool, a_starts, x_TI, width))
        return
    for token in range(0, num_tokens, 4):
        x_starts = _starts4(0, token, num_tokens, width)
        sums = _dot_block(zero, pool, a_starts, x_TI, x_starts)
        _store_totals(h_TR, token, sums[0])
        _store_totals(h_TR, token + 1, sums[1])
        _store_totals(h_TR, token + 2, sums[2])
        _store_totals(h_TR, token + 3, sums[3])


@inlined
def _starts4(offset: int, row: int, num_rows: int, width: int) -> Any:
    """Where rows `row : row + 4` begin; the last row stands in for rows that do not exist."""
    last = num_rows - 1
    return (
        offset + row * width,
        offset + min(row + 1, last) * width,
        offset + min(row + 2, last) * width,
        offset + min(row + 3, last) * width,
    )


@inlined
def _store_totals(h_TR: Any, token: int, sums: Any) -> None:
    if token >= h_TR.shape[0]:
        return
    num_rows = h_TR.shape[1]
    h_TR[token, 0] = total(sums[0])
    if num_rows > 1:
        h_TR[token, 1] = total(sums[1])
    if num_rows > 2:
        h_TR[token, 2] = total(sums[2])
    if num_rows > 3:
        h_TR[token, 3] = total(sums[3])


@inlined
def _dot_rows(zero: Any, pool: Any, a_starts: Any, x: Any, width: int) -> Any:
    """Lane by lane the dot products of four rows of A with the first token of `x`."""
    sums = (zero, zero, zero, zero)
    whole = width - width % LANES
    for i in range(0, whole, LANES):
        sums = _multiply_add4(_load4(zero, pool, a_starts, i), load(zero, x, i), sums)
    if whole < width:
        a = _load_part4(zero, pool, a_starts, whole, width - whole)
        sums = _multiply_add4(a, load_part(zero, x, whole, width - whole), sums)
    return sums


@inlined
def _dot_block(zero: Any, pool: Any, a_starts: Any, x_TI: Any, x_starts: Any) -> Any:
    """`_dot_rows` for four tokens: each element is loaded once for four products."""
    none = (zero, zero, zero, zero)
    sums = (none, none, none, none)
    width = x_TI.shape[1]
    whole = width - width % LANES
    for i in range(0, whole, LANES):
        a = _load4(zero, pool, a_starts, i)
        sums = _multiply_add16(a, _load4(zero, x_TI, x_starts, i), sums)
    if whole < width:
        a = _load_part4(zero, pool, a_starts, whole, width - whole)
        x = _load_part4(zero, x_TI, x_starts, whole, width - whole)
        sums = _multiply_add16(a, x, sums)
    return sums


@inlined
def _load4(zero: Any, array: Any, starts: Any, index: int) -> Any:
    return (
        load(zero, array, starts[0] + index),
        load(zero, array, starts[1] + index),
        load(zero, array, starts[2] + index),
        load(zero, array, starts[3] + index),
    )


@inlined
def _load_part4(zero: Any, array: Any, starts: Any, index: int, count: int) -> Any:
    return (
        load_part(zero, array, starts[0] + index, count),
        load_part(zero, array, starts[1] + index, count),
        load_part(zero, array, starts[2] + index, count),
        load_part(zero, array, starts[3] + index, count),
    )


@inlined
def _multiply_add4(vectors: Any, factor: Any, sums: Any) -> Any:
    return (
        multiply_add(vectors[0], factor, sums[0]),
        multiply_add(vectors[1], factor, sums[1]),
        multiply_add(vectors[2], factor, sums[2]),
        multiply_add(vectors[3], factor, sums[3]),
    )


@inlined
def _multiply_add16(vectors: Any, factors: Any, sums: Any) -> Any:
    return (
        _multiply_add4(vectors, factors[0], sums[0]),
        _multiply_add4(vectors, factors[1], sums[1]),
        _multiply_add4(vectors, factors[2], sums[2]),
        _multiply_add4(vectors, factors[3], sums[3]),
    )
