"""The expand operation: each element of Bt is read once for some tokens of its segment.

An item takes some columns of all tiles of a segment. A single token whose tiles have no u and v is
added up row by row of Bt, everything else in blocks (kernels/cpu/expand_blocks). An item is run by
kernels/cpu/operations; kernels/cpu/lora records it.
"""

from __future__ import annotations

from typing import Any

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.cpu.expand_blocks import Update, expand_blocks, finish_rows
from loraswarm.kernels.cpu.jit import called, inlined
from loraswarm.kernels.cpu.memory import (
    float_at,
    int32_at,
    int64_at,
    memory_at,
    moved,
    prefetch_far,
)
from loraswarm.kernels.cpu.terms import whole_lines
from loraswarm.kernels.cpu.tiles import (
    BT_OFFSET,
    BT_STRIDE,
    GAIN_OFFSET,
    RANKS,
    SCALE,
    U_OFFSET,
    V_OFFSET,
    find_item,
)
from loraswarm.kernels.cpu.vectors import (
    broadcast,
    load,
    load_up_to,
    multiply_add,
    store,
    zeros,
)

WIDE_LANES = 64
LANES = 16
GROUP = 4
AHEAD_ELEMENTS = 512


@called
def expand_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Some columns for some tokens; the arguments are those that kernels/cpu/lora makes."""
    scratch = whole_lines(scratch)
    num_tokens, num_columns = arguments[2], arguments[4]
    words, first_site = int64_at(arguments[6]), arguments[8]
    found = find_item(item, words, int64_at(arguments[7]), first_site, arguments[9])
    widths = moved(int64_at(arguments[11]), first_site)
    first_column = 0
    for part in range(found.part):
        first_column += widths[part]
    y_stride, tile = arguments[1], found.first_tile
    gains = moved(int64_at(words[GAIN_OFFSET]), 2 * found.unit)
    h_row = found.part * num_tokens + found.first_token
    update = Update(
        moved(memory_at(like, arguments[0]), found.first_token * y_stride + first_column),
        y_stride,
        moved(float_at(arguments[3]), h_row * num_columns),
        num_columns,
        found.num_tokens,
        memory_at(like, arguments[5]),
        moved(int64_at(words[BT_OFFSET]), tile),
        moved(int64_at(words[BT_STRIDE]), tile),
        moved(int32_at(words[RANKS]), tile),
        moved(float_at(words[SCALE]), tile),
        found.last_tile - tile,
        widths[found.part],
        float_at(arguments[5]),
        moved(int64_at(words[U_OFFSET]), tile),
        moved(int64_at(words[V_OFFSET]), tile),
        gains[0],
        gains[1],
    )
    piece_columns = int(int32_at(arguments[10])[found.unit])
    low = found.piece * piece_columns
    high = min(low + piece_columns, update.width)
    if found.num_tokens == 1 and not _has_factors(update):
        _expand_token(update, low, high, scratch)
    else:
        expand_blocks(update, low, high, scratch)


@called
def _has_factors(update: Update) -> bool:
    """Whether a tile has u or v."""
    highest = -1
    for tile in range(update.num_tiles):
        highest = max(highest, update.u[tile], update.v[tile])
    return highest >= 0


@called
def _expand_token(update: Update, low: int, high: int, sums: Any) -> None:
    """Columns `low : high` of one token: four rows of Bt after four are added to `sums`."""
    zero = zeros(LANES)
    for column in range(0, high - low, LANES):
        store(zero, sums, column)
    for tile in range(update.num_tiles):
        ranks, stride = int(update.ranks[tile]), update.stride[tile]
        bt = moved(update.pool, update.offset[tile] + low)
        factors = moved(update.h, tile * MAX_TILE_RANKS)
        row = 0
        while row + GROUP <= ranks:
            next_row = (row + GROUP) * stride
            if row + GROUP == ranks and tile + 1 < update.num_tiles:
                next_row = update.offset[tile + 1] - update.offset[tile]
            jump = next_row - row * stride - (high - low)
            if row + GROUP == ranks and tile + 1 == update.num_tiles:
                jump = 0
            _add_rows4(
                moved(bt, row * stride),
                stride,
                moved(factors, row),
                update.scale[tile],
                high - low,
                jump,
                sums,
            )
            row += GROUP
        while row < ranks:
            _add_row(moved(bt, row * stride), factors[row] * update.scale[tile], high - low, sums)
            row += 1
    finish_rows(update, low, high, sums)


@called
def _add_rows4(bt: Any, stride: int, h: Any, scale: Any, count: int, jump: int, sums: Any) -> None:
    """sums += scale * h[r] * row r of Bt, for four rows of `count` elements.

    Fetches what comes next: of these rows, and then of those `jump` behind their ends.
    """
    wide = zeros(WIDE_LANES)
    factors = (h[0] * scale, h[1] * scale, h[2] * scale, h[3] * scale)
    column = 0
    while column + WIDE_LANES <= count:
        ahead = column + AHEAD_ELEMENTS
        if ahead >= count:
            ahead += jump
        _prefetch_row(bt, ahead)
        _prefetch_row(bt, ahead + stride)
        _prefetch_row(bt, ahead + 2 * stride)
        _prefetch_row(bt, ahead + 3 * stride)
        value = load(wide, sums, column)
        value = multiply_add(load(wide, bt, column), broadcast(wide, factors[0]), value)
        value = multiply_add(load(wide, bt, column + stride), broadcast(wide, factors[1]), value)
        value = multiply_add(
            load(wide, bt, column + 2 * stride), broadcast(wide, factors[2]), value
        )
        value = multiply_add(
            load(wide, bt, column + 3 * stride), broadcast(wide, factors[3]), value
        )
        store(value, sums, column)
        column += WIDE_LANES
    if column < count:
        for row in range(GROUP):
            _add_tail(moved(bt, row * stride), factors[row], column, count, sums)


@inlined
def _prefetch_row(bt: Any, index: int) -> None:
    prefetch_far(bt, index)
    prefetch_far(bt, index + WIDE_LANES // 2)


@called
def _add_row(bt: Any, factor: Any, count: int, sums: Any) -> None:
    _add_tail(bt, factor, 0, count, sums)


@called
def _add_tail(bt: Any, factor: Any, column: int, count: int, sums: Any) -> None:
    """sums += factor * elements `column : count` of a row; `sums` goes on to a whole vector."""
    zero = zeros(LANES)
    factors = broadcast(zero, factor)
    while column < count:
        elements = load_up_to(zero, bt, column, count - column)
        store(multiply_add(elements, factors, load(zero, sums, column)), sums, column)
        column += LANES
