"""The expand kernel: each element of Bt is read once for all tokens of its segment.

A vector of columns stays in registers while all ranks are added to it. Called by kernels/cpu/lora
only.
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
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    load,
    load_up_to,
    memory_of,
    multiply_add,
    num_lanes,
    store,
    store_up_to,
    zeros,
)

PIECE_COLUMNS = 256
ONE_TOKEN_LANES = 256  # long runs of each row of Bt: a single token waits for memory
FOUR_TOKEN_LANES = 64
TAIL_LANES = 16


class Update(NamedTuple):
    """What some tokens of one segment add to their columns of `y` at one part; bare pointers.

    Row t of the tokens is at `y + t * y_stride` and at `h + t * h_stride`. `offset`, `ranks` and
    `scale` are those of the segment's tiles, whose rows have `width` elements.
    """

    y: Any
    y_stride: int
    h: Any
    h_stride: int
    num_tokens: int
    pool: Any
    offset: Any
    ranks: Any
    scale: Any
    num_tiles: int
    width: int


@kernel
def expand(y: Any, y_stride: int, h_QTR: Any, tiles: TileArrays, limits: Limits) -> None:
    """`kernels.reference.lora_expand_` on the flat `y`, for the segments within `limits`."""
    first_item, next_item = _count_items(h_QTR, tiles, limits)
    for _ in prange(limits.num_threads):
        _expand_items(y, y_stride, h_QTR, tiles, first_item, next_item)


@called
def _count_items(h_QTR: Any, tiles: TileArrays, limits: Limits) -> Any:
    check_tiles(tiles, h_QTR)
    num_parts, num_segments = tiles.ranges.shape[:2]
    pieces_U = np.zeros(num_parts * num_segments, np.int64)
    for unit in range(pieces_U.size):
        part, segment = divmod(unit, num_segments)
        if tiles.ranges[part, segment, 0] < tiles.ranges[part, segment, 1]:
            pieces_U[unit] = ceil_divide(tiles.widths[part], PIECE_COLUMNS)
    return first_items(tiles, pieces_U, limits.max_tokens), np.zeros(1, np.int64)


@called
def _expand_items(
    y: Any, y_stride: int, h_QTR: Any, tiles: TileArrays, first_item: Any, next_item: Any
) -> None:
    """One thread's share: items until none is left."""
    _, num_tokens, num_columns = h_QTR.shape
    number = add_atomically(next_item, 0, 1)
    while number < first_item[-1]:
        item = find_item(number, tiles, first_item)
        h_row = item.part * num_tokens + item.first_token
        y_start = item.first_token * y_stride + tiles.widths[: item.part].sum()
        update = Update(
            memory_of(y, y_start),
            y_stride,
            memory_of(h_QTR, h_row * num_columns),
            num_columns,
            item.num_tokens,
            memory_of(tiles.pool, 0),
            memory_of(tiles.offset, item.first_tile),
            memory_of(tiles.ranks, item.first_tile),
            memory_of(tiles.scale, item.first_tile),
            item.last_tile - item.first_tile,
            tiles.widths[item.part],
        )
        low = item.piece * PIECE_COLUMNS
        high = min(low + PIECE_COLUMNS, update.width)
        if update.num_tokens == 1:
            _expand_one_token(update, low, high)
        else:
            _expand_tokens(update, low, high)
        number = add_atomically(next_item, 0, 1)


@called
def _expand_one_token(update: Update, low: int, high: int) -> None:
    """y += scale * h @ Bt for columns `low : high` of one token."""
    low = _expand_one(zeros(ONE_TOKEN_LANES), update, low, high)
    low = _expand_one(zeros(FOUR_TOKEN_LANES), update, low, high)
    _expand_one(zeros(TAIL_LANES), update, low, high + TAIL_LANES - 1)


@called
def _expand_tokens(update: Update, low: int, high: int) -> None:
    """y += scale * h @ Bt for columns `low : high` of several tokens."""
    low = _expand_many(zeros(FOUR_TOKEN_LANES), update, low, high)
    _expand_many(zeros(TAIL_LANES), update, low, high + TAIL_LANES - 1)


@inlined
def _expand_one(zero: Any, update: Update, low: int, high: int) -> int:
    """Update one token's columns from `low` while a vector fits below `high`; returns the next."""
    while low + num_lanes(zero) <= high:
        delta = zero
        for tile in range(update.num_tiles):
            bt_index = update.offset[tile] + low
            first_rank = tile * MAX_TILE_RANKS
            for rank in range(first_rank, first_rank + update.ranks[tile]):
                bt = _load_columns(zero, update.pool, bt_index, update.width - low)
                factor = broadcast(zero, update.h[rank] * update.scale[tile])
                delta = multiply_add(bt, factor, delta)
                bt_index += update.width
        _add_to_row(delta, update, 0, low)
        low += num_lanes(zero)
    return low


@inlined
def _expand_many(zero: Any, update: Update, low: int, high: int) -> int:
    """`_expand_one` for all tokens, four at a time; the last stands in for what is missing."""
    num_tokens = update.num_tokens
    last = num_tokens - 1
    while low + num_lanes(zero) <= high:
        for token in range(0, num_tokens, 4):
            tokens = (token, min(token + 1, last), min(token + 2, last), min(token + 3, last))
            deltas = _sum_ranks4(zero, update, tokens, low)
            _add_to_row(deltas[0], update, token, low)
            if token + 1 < num_tokens:
                _add_to_row(deltas[1], update, token + 1, low)
            if token + 2 < num_tokens:
                _add_to_row(deltas[2], update, token + 2, low)
            if token + 3 < num_tokens:
                _add_to_row(deltas[3], update, token + 3, low)
        low += num_lanes(zero)
    return low


@inlined
def _sum_ranks4(zero: Any, update: Update, tokens: Any, low: int) -> Any:
    deltas = (zero, zero, zero, zero)
    h, h_stride = update.h, update.h_stride
    for tile in range(update.num_tiles):
        bt_index = update.offset[tile] + low
        first_rank = tile * MAX_TILE_RANKS
        scale = update.scale[tile]
        for rank in range(first_rank, first_rank + update.ranks[tile]):
            bt = _load_columns(zero, update.pool, bt_index, update.width - low)
            factors = (
                broadcast(zero, h[rank + tokens[0] * h_stride] * scale),
                broadcast(zero, h[rank + tokens[1] * h_stride] * scale),
                broadcast(zero, h[rank + tokens[2] * h_stride] * scale),
                broadcast(zero, h[rank + tokens[3] * h_stride] * scale),
            )
            deltas = (
                multiply_add(bt, factors[0], deltas[0]),
                multiply_add(bt, factors[1], deltas[1]),
                multiply_add(bt, factors[2], deltas[2]),
                multiply_add(bt, factors[3], deltas[3]),
            )
            bt_index += update.width
    return deltas


@inlined
def _add_to_row(delta: Any, update: Update, token: int, low: int) -> None:
    index = token * update.y_stride + low
    count = update.width - low
    y = add(_load_columns(delta, update.y, index, count), delta)
    if num_lanes(delta) == TAIL_LANES:
        store_up_to(y, update.y, index, count)
    else:
        store(y, update.y, index)


@inlined
def _load_columns(like: Any, memory: Any, index: int, count: int) -> Any:
    """Only the narrowest vectors meet the end of a row."""
    if num_lanes(like) == TAIL_LANES:
        return load_up_to(like, memory, index, count)
    return load(like, memory, index)
