"""The shrink kernel: each row of A is read once for all tokens of its segment.

Four rows and four tokens share each load. Called by kernels/cpu/lora only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.cpu.jit import add_atomically, called, inlined, kernel
from loraswarm.kernels.cpu.tiles import (
    Limits,
    TileArrays,
    ceil_divide,
    check_tiles,
    find_item,
    first_items,
)
from loraswarm.kernels.cpu.vectors import load, load_part, memory_of, multiply_add, total, zeros

LANES = 16
PIECE_ROWS = 4


class Block(NamedTuple):
    """Bare pointers to up to 4 rows of A, to rows of x for some tokens, and to where h goes.

    Rows of x follow each other after `width` elements, those of A and h after their strides.
    """

    x: Any
    a: Any
    a_stride: int
    h: Any
    h_stride: int
    width: int
    num_rows: int
    num_tokens: int


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
    width = x_TI.shape[1]
    _, num_tokens, num_columns = h_QTR.shape
    number = add_atomically(next_item, 0, 1)
    while number < first_item[-1]:
        item = find_item(number, tiles, first_item)
        tile, row = item.first_tile, item.piece * PIECE_ROWS
        while row >= _padded_rows(tiles.ranks[tile]):
            row -= _padded_rows(tiles.ranks[tile])
            tile += 1
        column = (tile - item.first_tile) * MAX_TILE_RANKS + row
        h_row = item.part * num_tokens + item.first_token
        block = Block(
            memory_of(x_TI, item.first_token * width),
            memory_of(tiles.pool, tiles.offset[tile] + row * tiles.stride[tile]),
            tiles.stride[tile],
            memory_of(h_QTR, h_row * num_columns + column),
            num_columns,
            width,
            min(tiles.ranks[tile] - row, PIECE_ROWS),
            item.num_tokens,
        )
        _shrink_rows(block)
        number = add_atomically(next_item, 0, 1)


@called
def _padded_rows(ranks: int) -> int:
    return ceil_divide(ranks, PIECE_ROWS) * PIECE_ROWS


@called
def _shrink_rows(block: Block) -> None:
    """h = x @ A.T, four tokens at a time.

    What is missing to four repeats the last row or token and is not stored; a token's sum does not
    depend on its neighbours.
    """
    zero = zeros(LANES)
    a_starts = _starts4(0, block.num_rows, block.a_stride)
    if block.num_tokens == 1:
        _store_totals(block, 0, _dot_rows(zero, block, a_starts))
        return
    for token in range(0, block.num_tokens, 4):
        x_starts = _starts4(token, block.num_tokens, block.width)
        sums = _dot_block(zero, block, a_starts, x_starts)
        _store_totals(block, token, sums[0])
        _store_totals(block, token + 1, sums[1])
        _store_totals(block, token + 2, sums[2])
        _store_totals(block, token + 3, sums[3])


@inlined
def _starts4(row: int, num_rows: int, stride: int) -> Any:
    """Where rows `row : row + 4` begin; the last row stands in for rows that do not exist."""
    last = num_rows - 1
    return (
        row * stride,
        min(row + 1, last) * stride,
        min(row + 2, last) * stride,
        min(row + 3, last) * stride,
    )


@inlined
def _store_totals(block: Block, token: int, sums: Any) -> None:
    if token >= block.num_tokens:
        return
    h, index = block.h, token * block.h_stride
    h[index] = total(sums[0])
    if block.num_rows > 1:
        h[index + 1] = total(sums[1])
    if block.num_rows > 2:
        h[index + 2] = total(sums[2])
    if block.num_rows > 3:
        h[index + 3] = total(sums[3])


@inlined
def _dot_rows(zero: Any, block: Block, a_starts: Any) -> Any:
    """Lane by lane the dot products of four rows of A with the block's first token."""
    sums = (zero, zero, zero, zero)
    a, x = block.a, block.x
    whole, rest = block.width - block.width % LANES, block.width % LANES
    for i in range(0, whole, LANES):
        sums = _multiply_add4(_load4(zero, a, a_starts, i), load(zero, x, i), sums)
    if rest > 0:
        a_rest = _load_part4(zero, a, a_starts, whole, rest)
        sums = _multiply_add4(a_rest, load_part(zero, x, whole, rest), sums)
    return sums


@inlined
def _dot_block(zero: Any, block: Block, a_starts: Any, x_starts: Any) -> Any:
    """`_dot_rows` for four tokens: each element is loaded once for four products."""
    none = (zero, zero, zero, zero)
    sums = (none, none, none, none)
    a, x = block.a, block.x
    whole, rest = block.width - block.width % LANES, block.width % LANES
    for i in range(0, whole, LANES):
        rows = _load4(zero, a, a_starts, i)
        sums = _multiply_add16(rows, _load4(zero, x, x_starts, i), sums)
    if rest > 0:
        rows = _load_part4(zero, a, a_starts, whole, rest)
        sums = _multiply_add16(rows, _load_part4(zero, x, x_starts, whole, rest), sums)
    return sums


@inlined
def _load4(zero: Any, memory: Any, starts: Any, index: int) -> Any:
    return (
        load(zero, memory, starts[0] + index),
        load(zero, memory, starts[1] + index),
        load(zero, memory, starts[2] + index),
        load(zero, memory, starts[3] + index),
    )


@inlined
def _load_part4(zero: Any, memory: Any, starts: Any, index: int, count: int) -> Any:
    return (
        load_part(zero, memory, starts[0] + index, count),
        load_part(zero, memory, starts[1] + index, count),
        load_part(zero, memory, starts[2] + index, count),
        load_part(zero, memory, starts[3] + index, count),
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
