"""The work of one LoRA kernel call, cut into items for the threads.

Items depend on the batch alone, never on the number of threads, and every sum inside an item has
one order, so results are equal bit for bit however many threads run. Used by shrink and expand.

    unit   one segment at one part of a fused linear
    piece  shrink: 4 rows of one A; expand: 256 columns of all Bt
    item   a piece of a unit for 16 of its tokens
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.cpu.jit import called

ITEM_TOKENS = 16
FLOAT_BYTES = 4


class TileArrays(NamedTuple):
    """What one fused linear uses of a `TileTable`, as arrays.

    `ranges` [Q, G, 2] holds its parts only; `offset` and `stride` are those of A or of Bt; `widths`
    [Q] is how much of a tile's rows each part uses.
    """

    pool: Any
    segments: Any
    ranges: Any
    offset: Any
    stride: Any
    ranks: Any
    widths: Any


class VectorArrays(NamedTuple):
    """What only expand uses of a `TileTable`; `gain_offset` [Q, G, 2] as `ranges`."""

    scale: Any
    u_offset: Any
    v_offset: Any
    gain_offset: Any


class Limits(NamedTuple):
    """Segments of more than `max_tokens` tokens are skipped; at most `num_threads` threads run."""

    max_tokens: int
    num_threads: int


@called
def check_tiles(tiles: TileArrays, h_QTR: Any) -> None:
    """Raise ValueError where a table would lead outside of the pool or of the batch."""
    num_parts, num_segments = tiles.ranges.shape[:2]
    num_tiles = tiles.offset.size
    if tiles.stride.size != num_tiles or tiles.ranks.size != num_tiles:
        raise ValueError("tiles.a_stride, tiles.bt_stride or tiles.ranks has another length")
    if tiles.segments[0] != 0 or tiles.segments[num_segments] != h_QTR.shape[1]:
        raise ValueError("tiles.segments must go from 0 to the number of tokens")
    for segment in range(num_segments):
        if tiles.segments[segment] > tiles.segments[segment + 1]:
            raise ValueError("tiles.segments must ascend")
    for part in range(num_parts):
        for segment in range(num_segments):
            first, last = tiles.ranges[part, segment]
            if first < last and (first < 0 or last > num_tiles):
                raise ValueError("tiles.ranges names tiles that do not exist")
            if (last - first) * MAX_TILE_RANKS > h_QTR.shape[2]:
                raise ValueError("h_QTR has fewer columns than tiles.ranges needs")
            for tile in range(first, last):
                _check_tile(tiles, tile, tiles.widths[part])


@called
def _check_tile(tiles: TileArrays, tile: int, width: int) -> None:
    ranks, offset, stride = tiles.ranks[tile], tiles.offset[tile], tiles.stride[tile]
    if ranks < 1 or ranks > MAX_TILE_RANKS:
        raise ValueError("tiles.ranks must be from 1 to 16")
    if stride < width:
        raise ValueError("tiles.a_stride or tiles.bt_stride is less than a row")
    if offset < 0 or offset + (ranks - 1) * stride + width > tiles.pool.size:
        raise ValueError("a tile lies outside of the pool: tiles.a_offset or tiles.bt_offset")


@called
def check_vectors(tiles: TileArrays, vectors: VectorArrays) -> None:
    """Raise ValueError where a vector would lead outside of the pool; after `check_tiles`."""
    num_parts, num_segments = tiles.ranges.shape[:2]
    scale, u_offset, v_offset, gain_offset = vectors
    num_tiles = tiles.offset.size
    if scale.size != num_tiles or u_offset.size != num_tiles or v_offset.size != num_tiles:
        raise ValueError("tiles.scale, tiles.u_offset or tiles.v_offset has another length")
    num_floats = tiles.pool.size * tiles.pool.itemsize // FLOAT_BYTES
    for part in range(num_parts):
        last_start = max(num_floats - tiles.widths[part], -1)
        for segment in range(num_segments):
            gain, constant = gain_offset[part, segment]
            if max(gain, constant) > last_start or min(gain, constant) < -1:
                raise ValueError("a vector lies outside of the pool: tiles.gain_offset")
            for tile in range(tiles.ranges[part, segment, 0], tiles.ranges[part, segment, 1]):
                if v_offset[tile] > last_start or v_offset[tile] < -1:
                    raise ValueError("a vector lies outside of the pool: tiles.v_offset")
                last_u = max(num_floats - tiles.ranks[tile], -1)
                if u_offset[tile] > last_u or u_offset[tile] < -1:
                    raise ValueError("a vector lies outside of the pool: tiles.u_offset")


@called
def ceil_divide(amount: int, unit: int) -> int:
    """How many units hold `amount`."""
    return (amount + unit - 1) // unit


class Item(NamedTuple):
    """A piece of one segment's work at one part, for `num_tokens` tokens from `first_token`."""

    part: int
    segment: int
    first_tile: int
    last_tile: int
    piece: int
    first_token: int
    num_tokens: int


@called
def first_items(tiles: TileArrays, pieces_U: Any, max_tokens: int) -> Any:
    """The number of each unit's first item, then the number of all items."""
    num_segments = tiles.ranges.shape[1]
    first_item = np.zeros(pieces_U.size + 1, np.int64)
    for unit in range(pieces_U.size):
        segment = unit % num_segments
        num_tokens = tiles.segments[segment + 1] - tiles.segments[segment]
        blocks = 0
        if num_tokens <= max_tokens:
            blocks = ceil_divide(num_tokens, ITEM_TOKENS)
        first_item[unit + 1] = first_item[unit] + pieces_U[unit] * blocks
    return first_item


@called
def find_item(number: int, tiles: TileArrays, first_item: Any) -> Item:
    """The item with this number."""
    unit: Any = np.searchsorted(first_item, number, side="right") - 1
    num_segments = tiles.ranges.shape[1]
    part, segment = unit // num_segments, unit % num_segments
    begin: Any = np.int64(tiles.segments[segment])
    end: Any = np.int64(tiles.segments[segment + 1])
    blocks = ceil_divide(end - begin, ITEM_TOKENS)
    index = number - first_item[unit]
    begin += index % blocks * ITEM_TOKENS
    first_tile, last_tile = tiles.ranges[part, segment]
    num_tokens = min(end - begin, ITEM_TOKENS)
    return Item(part, segment, first_tile, last_tile, index // blocks, begin, num_tokens)
