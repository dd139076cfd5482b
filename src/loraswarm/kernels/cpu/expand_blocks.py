"""Expand for several tokens: a block of 64 columns of Bt is widened once for all of them.

    scratch   | sums: blocks of [32 tokens, 64] | Bt [64 ranks, 64] | factors [64 ranks, 32] |

Called by kernels/cpu/expand only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.cpu.jit import called, inlined
from loraswarm.kernels.cpu.memory import moved, prefetch_far
from loraswarm.kernels.cpu.tiles import BLOCK_COLUMNS, EXPAND_ELEMENTS, ITEM_TOKENS
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    load,
    load_up_to,
    multiply,
    multiply_add,
    store,
    store_up_to,
    zeros,
)

LANES = 16
CHUNK_TILES = 4
CHUNK_RANKS = CHUNK_TILES * MAX_TILE_RANKS
BT_AT = ITEM_TOKENS * (EXPAND_ELEMENTS // CHUNK_RANKS)
FACTORS_AT = BT_AT + CHUNK_RANKS * BLOCK_COLUMNS
ZERO, ONE = np.float32(0.0), np.float32(1.0)


class Update(NamedTuple):
    """What some tokens of one segment add to their columns of `y` at one part; bare pointers.

    Row t of the tokens is at `y + t * y_stride` and at `h + t * h_stride`. `offset`, `stride`,
    `ranks`, `scale`, `u` and `v` are those of the segment's tiles; `width` columns of their rows
    are used. Vectors lie in `floats`, the pool as float32; -1 stands for none.
    """

    y: Any
    y_stride: int
    h: Any
    h_stride: int
    num_tokens: int
    pool: Any
    offset: Any
    stride: Any
    ranks: Any
    scale: Any
    num_tiles: int
    width: int
    floats: Any
    u: Any
    v: Any
    gain: int
    constant: int


@called
def expand_blocks(update: Update, low: int, high: int, scratch: Any) -> None:
    """y = gain * (y + v * (scale * u * h) @ Bt) + constant for columns `low : high`.

    Where all tiles do not fit into one chunk, the sums of all blocks are kept from one to the next.
    """
    bt, factors = moved(scratch, BT_AT), moved(scratch, FACTORS_AT)
    kept = 0 if update.num_tiles <= CHUNK_TILES else ITEM_TOKENS
    first_tile = 0
    while first_tile == 0 or first_tile < update.num_tiles:
        last_tile = min(first_tile + CHUNK_TILES, update.num_tiles)
        num_ranks = _make_factors(update, first_tile, last_tile, factors)
        for column in range(low, high, BLOCK_COLUMNS):
            sums = moved(scratch, (column - low) * kept)
            if last_tile == update.num_tiles:
                _prefetch_rows(update, column)
            _widen(update, first_tile, last_tile, column, bt)
            for token in range(0, update.num_tokens, 4):
                _add_ranks(
                    moved(sums, token * BLOCK_COLUMNS),
                    bt,
                    moved(factors, token),
                    num_ranks,
                    first_tile == 0,
                )
            if last_tile == update.num_tiles:
                finish_rows(update, column, min(column + BLOCK_COLUMNS, high), sums)
        first_tile += CHUNK_TILES


@called
def _prefetch_rows(update: Update, low: int) -> None:
    """Columns of y that are read when the products are done; rows lie too far apart for the CPU to
    see them coming."""
    for token in range(update.num_tokens):
        prefetch_far(update.y, token * update.y_stride + low)
        prefetch_far(update.y, token * update.y_stride + low + BLOCK_COLUMNS // 2)


@called
def _widen(update: Update, first_tile: int, last_tile: int, low: int, target: Any) -> None:
    """64 columns of some tiles times v as float32; zeros beyond the end of a row."""
    row = 0
    for tile in range(first_tile, last_tile):
        _widen_tile(update, tile, low, moved(target, row * BLOCK_COLUMNS))
        row += int(update.ranks[tile])


@called
def _widen_tile(update: Update, tile: int, low: int, target: Any) -> None:
    zero, wide = zeros(LANES), zeros(BLOCK_COLUMNS)
    stride, v_offset = update.stride[tile], update.v[tile]
    for row in range(update.ranks[tile]):
        source = moved(update.pool, update.offset[tile] + row * stride)
        prefetch_far(source, low + 2 * BLOCK_COLUMNS)
        prefetch_far(source, low + 2 * BLOCK_COLUMNS + BLOCK_COLUMNS // 2)
        if v_offset < 0 and low + BLOCK_COLUMNS <= update.width:
            store(load(wide, source, low), target, row * BLOCK_COLUMNS)
        else:
            for column in range(0, BLOCK_COLUMNS, LANES):
                elements = load_up_to(zero, source, low + column, update.width - low - column)
                v = _columns_or(ONE, zero, update, v_offset, low + column)
                store(multiply(elements, v), target, row * BLOCK_COLUMNS + column)


@called
def _make_factors(update: Update, first_tile: int, last_tile: int, target: Any) -> int:
    """scale * u * h of some tiles, [ranks, tokens]; the last token stands in for what is missing to
    four. Returns the number of ranks."""
    last = update.num_tokens - 1
    num_ranks = 0
    for tile in range(first_tile, last_tile):
        h = moved(update.h, tile * MAX_TILE_RANKS)
        for row in range(update.ranks[tile]):
            scale = update.scale[tile]
            if update.u[tile] >= 0:
                scale *= update.floats[update.u[tile] + row]
            for token in range((update.num_tokens + 3) // 4 * 4):
                factor = h[min(token, last) * update.h_stride + row] * scale
                target[num_ranks * ITEM_TOKENS + token] = factor
            num_ranks += 1
    return num_ranks


@called
def _add_ranks(sums: Any, bt: Any, factors: Any, num_ranks: int, is_first: bool) -> None:
    """sums [4, 64] += factors[:, :4]ᵀ @ bt; from zero if they are the first ranks."""
    wide = zeros(BLOCK_COLUMNS)
    s0, s1, s2, s3 = wide, wide, wide, wide
    if not is_first:
        s0 = load(wide, sums, 0)
        s1 = load(wide, sums, BLOCK_COLUMNS)
        s2 = load(wide, sums, 2 * BLOCK_COLUMNS)
        s3 = load(wide, sums, 3 * BLOCK_COLUMNS)
    for rank in range(num_ranks):
        columns = load(wide, bt, rank * BLOCK_COLUMNS)
        first = rank * ITEM_TOKENS
        s0 = multiply_add(columns, broadcast(wide, factors[first]), s0)
        s1 = multiply_add(columns, broadcast(wide, factors[first + 1]), s1)
        s2 = multiply_add(columns, broadcast(wide, factors[first + 2]), s2)
        s3 = multiply_add(columns, broadcast(wide, factors[first + 3]), s3)
    store(s0, sums, 0)
    store(s1, sums, BLOCK_COLUMNS)
    store(s2, sums, 2 * BLOCK_COLUMNS)
    store(s3, sums, 3 * BLOCK_COLUMNS)


@called
def finish_rows(update: Update, low: int, high: int, sums: Any) -> None:
    """y = gain * (y + sums) + constant for columns `low : high` of all tokens; rounds once.

    Each token's sums begin 64 after the last one's: a block of 64 columns, or any for one token.
    """
    zero, wide = zeros(LANES), zeros(BLOCK_COLUMNS)
    has_gains = max(update.gain, update.constant) >= 0
    for token in range(update.num_tokens):
        y = moved(update.y, token * update.y_stride)
        row_sums = moved(sums, token * BLOCK_COLUMNS)
        column = low
        while column + BLOCK_COLUMNS <= high and not has_gains:
            store(add(load(wide, y, column), load(wide, row_sums, column - low)), y, column)
            column += BLOCK_COLUMNS
        while column < high:
            value = load_up_to(zero, y, column, high - column)
            value = add(value, load(zero, row_sums, column - low))
            if has_gains:
                gain = _columns_or(ONE, zero, update, update.gain, column)
                constant = _columns_or(ZERO, zero, update, update.constant, column)
                value = multiply_add(gain, value, constant)
            store_up_to(value, y, column, high - column)
            column += LANES


@inlined
def _columns_or(absent: Any, like: Any, update: Update, offset: int, column: int) -> Any:
    """A vector's columns from `column` on; all `absent` if there is none."""
    if offset < 0:
        return broadcast(like, absent)
    return load_up_to(like, update.floats, offset + column, update.width - column)
