"""The LoRA work of a batch, cut into items for the threads, at all sites at once.

Items depend on the batch alone, never on the number of threads, and every sum inside an item has
one order, so results are equal bit for bit however many threads run. Used by table, shrink, expand.

    unit   one segment at one site; units are numbered by site, then segment
    piece  shrink: up to 16 rows of one A; expand: some columns of all Bt
    item   a piece of a unit for some of its tokens
"""

from __future__ import annotations

from typing import Any, NamedTuple

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.cpu.jit import called, kernel
from loraswarm.kernels.cpu.memory import int32_at, moved

ITEM_TOKENS = 32
SHRINK_ELEMENTS = 1 << 15
EXPAND_ELEMENTS = 1 << 15
"""About this much of A or Bt is one item's: 64 KiB of bfloat16."""
BLOCK_COLUMNS = 64

# Where the addresses of a table's arrays lie in `TablePlan.words`.
SEGMENTS, RANGES, RANKS, NUM_SEGMENTS = 0, 1, 2, 3
A_OFFSET, A_STRIDE, BT_OFFSET, BT_STRIDE = 4, 5, 6, 7
SCALE, U_OFFSET, V_OFFSET, GAIN_OFFSET = 8, 9, 10, 11
NUM_WORDS = 12

MESSAGES = (
    "",
    "tiles.ranges names tiles that do not exist",
    "tiles.ranks must be from 1 to 16",
    "tiles.a_stride or tiles.bt_stride is less than a row",
    "a tile lies outside of the pool: tiles.a_offset or tiles.bt_offset",
    "a vector lies outside of the pool: tiles.gain_offset",
    "a vector lies outside of the pool: tiles.v_offset",
    "a vector lies outside of the pool: tiles.u_offset",
)
NO_TILES, BAD_RANKS, BAD_STRIDE, BAD_OFFSET, BAD_GAIN, BAD_V, BAD_U = range(1, 8)


@kernel
def count_items(
    segments: Any,
    ranges: Any,
    offset: Any,
    stride: Any,
    ranks: Any,
    widths: Any,
    pool_size: int,
    items_U: Any,
    columns_U: Any,
    faults: Any,
) -> None:
    """How many items each unit has at the sites whose width is known, and what is wrong there.

    For shrink `columns_U` is empty; for expand it gets how many columns a piece has. `faults` gets
    for each site the number of a message, or 0. Units of a site with a fault get 0 items.
    """
    for site in range(widths.size):
        if widths[site] >= 0:
            fault = _check_site(ranges, offset, stride, ranks, site, widths[site], pool_size)
            faults[site] = fault
            if fault == 0:
                _count_site(segments, ranges, ranks, site, widths[site], items_U, columns_U)


@called
def _check_site(
    ranges: Any, offset: Any, stride: Any, ranks: Any, site: int, width: int, pool_size: int
) -> int:
    num_tiles = offset.size
    for segment in range(ranges.shape[1]):
        first, last = ranges[site, segment, 0], ranges[site, segment, 1]
        if first < last and (first < 0 or last > num_tiles):
            return NO_TILES
        for tile in range(first, last):
            if ranks[tile] < 1 or ranks[tile] > MAX_TILE_RANKS:
                return BAD_RANKS
            if stride[tile] < width:
                return BAD_STRIDE
            end = offset[tile] + (ranks[tile] - 1) * stride[tile] + width
            if offset[tile] < 0 or end > pool_size:
                return BAD_OFFSET
    return 0


@called
def _count_site(
    segments: Any, ranges: Any, ranks: Any, site: int, width: int, items_U: Any, columns_U: Any
) -> None:
    num_segments = ranges.shape[1]
    for segment in range(num_segments):
        first, last = ranges[site, segment, 0], ranges[site, segment, 1]
        unit = site * num_segments + segment
        blocks = ceil_divide(segments[segment + 1] - segments[segment], ITEM_TOKENS)
        if columns_U.size == 0:
            pieces = 0
            for tile in range(first, last):
                pieces += ceil_divide(ranks[tile], rows_per_piece(width))
            items_U[unit] = pieces * blocks
        else:
            columns_U[unit] = _columns_per_piece(max(last - first, 0), width)
            items_U[unit] = ceil_divide(width, columns_U[unit]) * blocks


@kernel
def check_vectors(
    ranges: Any,
    ranks: Any,
    u_offset: Any,
    v_offset: Any,
    gain_offset: Any,
    widths: Any,
    num_floats: int,
    items_U: Any,
    faults: Any,
) -> None:
    """After `count_items` for expand: faults of vectors, and no items where nothing changes."""
    for site in range(widths.size):
        if widths[site] >= 0 and faults[site] == 0:
            faults[site] = _check_vectors(
                ranges, ranks, u_offset, v_offset, gain_offset, site, widths[site], num_floats
            )
            _drop_idle(ranges, gain_offset, site, items_U)


@called
def _check_vectors(
    ranges: Any,
    ranks: Any,
    u_offset: Any,
    v_offset: Any,
    gain_offset: Any,
    site: int,
    width: int,
    num_floats: int,
) -> int:
    last_start = max(num_floats - width, -1)
    for segment in range(ranges.shape[1]):
        gain, constant = gain_offset[site, segment, 0], gain_offset[site, segment, 1]
        if max(gain, constant) > last_start or min(gain, constant) < -1:
            return BAD_GAIN
        for tile in range(ranges[site, segment, 0], ranges[site, segment, 1]):
            if v_offset[tile] > last_start or v_offset[tile] < -1:
                return BAD_V
            if u_offset[tile] > max(num_floats - ranks[tile], -1) or u_offset[tile] < -1:
                return BAD_U
    return 0


@called
def _drop_idle(ranges: Any, gain_offset: Any, site: int, items_U: Any) -> None:
    num_segments = ranges.shape[1]
    for segment in range(num_segments):
        has_tiles = ranges[site, segment, 0] < ranges[site, segment, 1]
        gains = max(gain_offset[site, segment, 0], gain_offset[site, segment, 1])
        if not has_tiles and gains < 0:
            items_U[site * num_segments + segment] = 0


@called
def rows_per_piece(width: int) -> int:
    """Rows of one tile of A, a multiple of 4, in one piece of shrink."""
    return min(max(SHRINK_ELEMENTS // max(width, 1) // 4 * 4, 4), MAX_TILE_RANKS)


@called
def _columns_per_piece(num_tiles: int, width: int) -> int:
    """Columns of all Bt in one piece of expand: whole blocks, and about equal pieces."""
    num_ranks = MAX_TILE_RANKS * max(num_tiles, 1)
    columns = max(EXPAND_ELEMENTS // num_ranks, BLOCK_COLUMNS)
    num_pieces = max(ceil_divide(width, columns), 1)
    columns = ceil_divide(width, num_pieces)
    return max(ceil_divide(columns, BLOCK_COLUMNS), 1) * BLOCK_COLUMNS


@called
def ceil_divide(amount: int, unit: int) -> int:
    """How many units hold `amount`."""
    return (amount + unit - 1) // unit


class Item(NamedTuple):
    """A piece of one segment's work at one part, for `num_tokens` tokens from `first_token`."""

    part: int
    segment: int
    unit: int
    first_tile: int
    last_tile: int
    piece: int
    first_token: int
    num_tokens: int


@called
def find_item(number: int, words: Any, first_item: Any, first_site: int, num_parts: int) -> Item:
    """The item with this number among those of one fused linear.

    `first_item` has the number of every unit's first item, at all sites.
    """
    num_segments = words[NUM_SEGMENTS]
    first_unit = first_site * num_segments
    number += first_item[first_unit]
    low, high = first_unit, first_unit + num_parts * num_segments
    while high - low > 1:
        middle = (low + high) // 2
        if first_item[middle] <= number:
            low = middle
        else:
            high = middle
    unit, segment = low, low % num_segments
    bounds = moved(int32_at(words[SEGMENTS]), segment)
    tiles = moved(int32_at(words[RANGES]), 2 * unit)
    begin, end = int(bounds[0]), int(bounds[1])
    blocks = ceil_divide(end - begin, ITEM_TOKENS)
    index = number - first_item[unit]
    begin += index % blocks * ITEM_TOKENS
    return Item(
        unit // num_segments - first_site,
        segment,
        unit,
        int(tiles[0]),
        int(tiles[1]),
        index // blocks,
        begin,
        min(end - begin, ITEM_TOKENS),
    )
