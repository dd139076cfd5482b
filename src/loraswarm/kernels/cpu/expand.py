"""The expand kernel: each element of Bt is read once for all tokens of its segment.

A vector of columns stays in registers while all ranks are added to it. Pieces whose segment has no
u, v or gains run code compiled without them. Called by kernels/cpu/lora only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.cpu.jit import add_atomically, called, inlined, kernel
from loraswarm.kernels.cpu.tiles import (
    Item,
    Limits,
    TileArrays,
    VectorArrays,
    ceil_divide,
    check_tiles,
    check_vectors,
    find_item,
    first_items,
)
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    float_memory_of,
    load,
    load_up_to,
    memory_of,
    multiply,
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
ZERO, ONE = np.float32(0.0), np.float32(1.0)


class Rows(NamedTuple):
    """A matrix as a flat array; each row begins `stride` elements after the last."""

    elements: Any
    stride: int


class Vectors(NamedTuple):
    """Where the vectors of an update lie in `floats`, the pool as float32; -1 stands for none.

    `u` and `v` point to one offset for each tile; `gain` and `constant` are offsets.
    """

    floats: Any
    u: Any
    v: Any
    gain: int
    constant: int


class Update(NamedTuple):
    """What some tokens of one segment add to their columns of `y` at one part; bare pointers.

    Row t of the tokens is at `y + t * y_stride` and at `h + t * h_stride`. `offset`, `stride`,
    `ranks` and `scale` are those of the segment's tiles; `width` columns of their rows are used.
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
    vectors: Vectors


@kernel
def expand(y: Rows, h_QTR: Any, tiles: TileArrays, vectors: VectorArrays, limits: Limits) -> None:
    """`kernels.reference.lora_expand_` for the segments within `limits`."""
    first_item, next_item = _count_items(h_QTR, tiles, vectors, limits)
    for _ in prange(limits.num_threads):
        _expand_items(y, h_QTR, tiles, vectors, first_item, next_item)


@called
def _count_items(h_QTR: Any, tiles: TileArrays, vectors: VectorArrays, limits: Limits) -> Any:
    check_tiles(tiles, h_QTR)
    check_vectors(tiles, vectors)
    num_parts, num_segments = tiles.ranges.shape[:2]
    pieces_U = np.zeros(num_parts * num_segments, np.int64)
    for unit in range(pieces_U.size):
        part, segment = divmod(unit, num_segments)
        first_tile, last_tile = tiles.ranges[part, segment]
        gain, constant = vectors.gain_offset[part, segment]
        if first_tile < last_tile or gain >= 0 or constant >= 0:
            pieces_U[unit] = ceil_divide(tiles.widths[part], PIECE_COLUMNS)
    return first_items(tiles, pieces_U, limits.max_tokens), np.zeros(1, np.int64)


@called
def _expand_items(
    y: Rows,
    h_QTR: Any,
    tiles: TileArrays,
    vectors: VectorArrays,
    first_item: Any,
    next_item: Any,
) -> None:
    """One thread's share: items until none is left."""
    number = add_atomically(next_item, 0, 1)
    while number < first_item[-1]:
        item = find_item(number, tiles, first_item)
        update = _update_of(item, y, h_QTR, tiles, vectors)
        low = item.piece * PIECE_COLUMNS
        high = min(low + PIECE_COLUMNS, update.width)
        if _has_vectors(update):
            _expand_with_vectors(update, low, high)
        elif update.num_tokens == 1:
            _expand_one_token(update, low, high)
        else:
            _expand_tokens(update, low, high)
        number = add_atomically(next_item, 0, 1)


@called
def _update_of(item: Item, y: Rows, h_QTR: Any, tiles: TileArrays, vectors: VectorArrays) -> Update:
    """All columns of an item's tokens at its part."""
    _, num_tokens, num_columns = h_QTR.shape
    h_row = item.part * num_tokens + item.first_token
    y_start = item.first_token * y.stride + tiles.widths[: item.part].sum()
    gain, constant = vectors.gain_offset[item.part, item.segment]
    segment_vectors = Vectors(
        float_memory_of(tiles.pool),
        memory_of(vectors.u_offset, item.first_tile),
        memory_of(vectors.v_offset, item.first_tile),
        gain,
        constant,
    )
    return Update(
        memory_of(y.elements, y_start),
        y.stride,
        memory_of(h_QTR, h_row * num_columns),
        num_columns,
        item.num_tokens,
        memory_of(tiles.pool, 0),
        memory_of(tiles.offset, item.first_tile),
        memory_of(tiles.stride, item.first_tile),
        memory_of(tiles.ranks, item.first_tile),
        memory_of(vectors.scale, item.first_tile),
        item.last_tile - item.first_tile,
        tiles.widths[item.part],
        segment_vectors,
    )


@called
def _has_vectors(update: Update) -> bool:
    vectors = update.vectors
    highest = max(vectors.gain, vectors.constant)
    for tile in range(update.num_tiles):
        highest = max(highest, vectors.u[tile], vectors.v[tile])
    return highest >= 0


@called
def _expand_one_token(update: Update, low: int, high: int) -> None:
    """y += scale * h @ Bt for columns `low : high` of one token."""
    low = _expand_one(zeros(ONE_TOKEN_LANES), update, low, high, False)
    low = _expand_one(zeros(FOUR_TOKEN_LANES), update, low, high, False)
    _expand_one(zeros(TAIL_LANES), update, low, high + TAIL_LANES - 1, False)


@called
def _expand_tokens(update: Update, low: int, high: int) -> None:
    """y += scale * h @ Bt for columns `low : high` of several tokens."""
    low = _expand_many(zeros(FOUR_TOKEN_LANES), update, low, high, False)
    _expand_many(zeros(TAIL_LANES), update, low, high + TAIL_LANES - 1, False)


@called
def _expand_with_vectors(update: Update, low: int, high: int) -> None:
    """y = gain * (y + v * (scale * u * h) @ Bt) + constant for columns `low : high`."""
    if update.num_tokens == 1:
        low = _expand_one(zeros(FOUR_TOKEN_LANES), update, low, high, True)
        _expand_one(zeros(TAIL_LANES), update, low, high + TAIL_LANES - 1, True)
    else:
        low = _expand_many(zeros(FOUR_TOKEN_LANES), update, low, high, True)
        _expand_many(zeros(TAIL_LANES), update, low, high + TAIL_LANES - 1, True)


@inlined
def _expand_one(zero: Any, update: Update, low: int, high: int, with_vectors: bool) -> int:
    """Update one token's columns from `low` while a vector fits below `high`; returns the next.

    `with_vectors` is a constant: what it excludes is not compiled.
    """
    while low + num_lanes(zero) <= high:
        delta = zero
        for tile in range(update.num_tiles):
            bt_index = update.offset[tile] + low
            first_rank = tile * MAX_TILE_RANKS
            v = _tile_columns(zero, update, tile, low, with_vectors)
            for rank in range(first_rank, first_rank + update.ranks[tile]):
                bt = _load_columns(zero, update.pool, bt_index, update.width - low)
                scale = _rank_scale(update, tile, rank - first_rank, with_vectors)
                factor = broadcast(zero, update.h[rank] * scale)
                delta = multiply_add(_times(bt, v, with_vectors), factor, delta)
                bt_index += update.stride[tile]
        _add_to_row(delta, update, 0, low, with_vectors)
        low += num_lanes(zero)
    return low


@inlined
def _expand_many(zero: Any, update: Update, low: int, high: int, with_vectors: bool) -> int:
    """`_expand_one` for all tokens, four at a time; the last stands in for what is missing."""
    num_tokens = update.num_tokens
    last = num_tokens - 1
    while low + num_lanes(zero) <= high:
        for token in range(0, num_tokens, 4):
            tokens = (token, min(token + 1, last), min(token + 2, last), min(token + 3, last))
            deltas = _sum_ranks4(zero, update, tokens, low, with_vectors)
            _add_to_row(deltas[0], update, token, low, with_vectors)
            if token + 1 < num_tokens:
                _add_to_row(deltas[1], update, token + 1, low, with_vectors)
            if token + 2 < num_tokens:
                _add_to_row(deltas[2], update, token + 2, low, with_vectors)
            if token + 3 < num_tokens:
                _add_to_row(deltas[3], update, token + 3, low, with_vectors)
        low += num_lanes(zero)
    return low


@inlined
def _sum_ranks4(zero: Any, update: Update, tokens: Any, low: int, with_vectors: bool) -> Any:
    deltas = (zero, zero, zero, zero)
    h, h_stride = update.h, update.h_stride
    for tile in range(update.num_tiles):
        bt_index = update.offset[tile] + low
        first_rank = tile * MAX_TILE_RANKS
        v = _tile_columns(zero, update, tile, low, with_vectors)
        for rank in range(first_rank, first_rank + update.ranks[tile]):
            bt = _load_columns(zero, update.pool, bt_index, update.width - low)
            bt = _times(bt, v, with_vectors)
            scale = _rank_scale(update, tile, rank - first_rank, with_vectors)
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
            bt_index += update.stride[tile]
    return deltas


@inlined
def _add_to_row(delta: Any, update: Update, token: int, low: int, with_vectors: bool) -> None:
    index = token * update.y_stride + low
    count = update.width - low
    y = add(_load_columns(delta, update.y, index, count), delta)
    if with_vectors:
        gain = _columns_or(ONE, delta, update, update.vectors.gain, low)
        y = multiply_add(gain, y, _columns_or(ZERO, delta, update, update.vectors.constant, low))
    if num_lanes(delta) == TAIL_LANES:
        store_up_to(y, update.y, index, count)
    else:
        store(y, update.y, index)


@inlined
def _rank_scale(update: Update, tile: int, rank: int, with_vectors: bool) -> Any:
    """scale * u of one rank of a tile."""
    scale = update.scale[tile]
    if with_vectors and update.vectors.u[tile] >= 0:
        scale *= update.vectors.floats[update.vectors.u[tile] + rank]
    return scale


@inlined
def _tile_columns(zero: Any, update: Update, tile: int, low: int, with_vectors: bool) -> Any:
    """v of a tile from column `low` on."""
    if with_vectors:
        return _columns_or(ONE, zero, update, update.vectors.v[tile], low)
    return zero


@inlined
def _times(bt: Any, v: Any, with_vectors: bool) -> Any:
    return multiply(bt, v) if with_vectors else bt


@inlined
def _columns_or(absent: Any, like: Any, update: Update, offset: int, low: int) -> Any:
    """Columns of a vector from `low` on; all `absent` if there is none."""
    if offset < 0:
        return broadcast(like, absent)
    return _load_columns(like, update.vectors.floats, offset + low, update.width - low)


@inlined
def _load_columns(like: Any, memory: Any, index: int, count: int) -> Any:
    """Only the narrowest vectors meet the end of a row."""
    if num_lanes(like) == TAIL_LANES:
        return load_up_to(like, memory, index, count)
    return load(like, memory, index)
