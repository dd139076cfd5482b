"""The LoRA work of a batch as lists of items, for all sites at once.

    unit   one segment at one site; units are numbered by site, then segment
    item   shrink: some tokens of a unit with some of its tiles; expand: some tokens with all tiles

Only units that change something have items, so work follows the active (segment, tile) pairs. Items
of adjacent sites are adjacent: one launch serves all parts of a fused linear. Pure functions on
numpy arrays; called by plan. Legend: M sites, G segments, U units = M G, W items, N tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from loraswarm.kernels import MAX_TILE_RANKS

Array = np.ndarray

# Words of an item, int32.
FIRST_TOKEN, NUM_TOKENS, FIRST_TILE, NUM_TILES = 0, 1, 2, 3
COLUMN, SITE = 4, 5
"""Of shrink: the first column of h, and the site."""
GAIN = 4
"""Of expand: which pair of gains, or -1."""
ITEM_WORDS = 8


class Cut(NamedTuple):
    """How many tokens and, in shrink, tiles an item has at most."""

    item_tokens: int
    item_tiles: int


DECODE = Cut(16, 1)
"""Bound by the bytes of A and Bt: many small items."""
PREFILL = Cut(64, 4)
"""Bound by x and y: x is read once for up to four tiles."""
DECODE_TOKENS = 256
"""Most tokens of a segment up to which a batch is cut for decode."""


def choose_cut(most_tokens: int) -> Cut:
    """The cut of a batch whose longest segment has that many tokens."""
    return DECODE if most_tokens <= DECODE_TOKENS else PREFILL


class Items:
    """How many items every unit has: those of site m are `starts[m] : starts[m + 1]`."""

    def __init__(self, items_MG: Array) -> None:
        self._items_U = items_MG.reshape(-1)
        self._num_segments = items_MG.shape[1]
        self.starts = np.zeros(items_MG.shape[0] + 1, np.int32)
        np.cumsum(items_MG.sum(axis=1), out=self.starts[1:])
        self.num_items = int(self.starts[-1])

    def spread(self) -> tuple[Array, Array, Array]:
        """Of each item: its unit, its segment, and its number within the unit. [W] int32 each."""
        num_units = self._items_U.size
        unit_W = np.repeat(np.arange(num_units, dtype=np.int32), self._items_U)
        segment_U = np.tile(
            np.arange(self._num_segments, dtype=np.int32), max(self.starts.size - 1, 0)
        )
        before_U = (np.cumsum(self._items_U) - self._items_U).astype(np.int32)
        index_W = np.arange(self.num_items, dtype=np.int32) - before_U[unit_W]
        return unit_W, segment_U[unit_W], index_W


def count_tiles(ranges: Array) -> Array:
    """Tiles of each unit: [M, G]."""
    counts_MG: Array = np.maximum(ranges[:, :, 1] - ranges[:, :, 0], 0)
    return counts_MG


def shrink_items(segments: Array, ranges: Array, cut: Cut) -> Items:
    """Items of (tokens, group of tiles), the groups of the same tokens adjacent."""
    return Items(
        _ceil_divide(count_tiles(ranges), cut.item_tiles) * _chunks(segments, cut.item_tokens)
    )


def expand_items(segments: Array, ranges: Array, gain_offset: Array, cut: Cut) -> Items:
    """Items of tokens, in units that have tiles or gains."""
    is_active_MG = (count_tiles(ranges) > 0) | _has_gains(gain_offset)
    return Items(is_active_MG * _chunks(segments, cut.item_tokens))


def write_shrink(items: Items, words: Array, segments: Array, ranges: Array, cut: Cut) -> None:
    """Fill `words` [W, ITEM_WORDS] int32."""
    unit_W, segment_W, index_W = items.spread()
    first_U = ranges[:, :, 0].reshape(-1)
    tiles_U = count_tiles(ranges).reshape(-1)
    groups_U = _ceil_divide(tiles_U, cut.item_tiles)
    chunk_W, group_W = index_W, np.zeros_like(index_W)
    if groups_U.max(initial=0) > 1:
        chunk_W, group_W = np.divmod(index_W, groups_U[unit_W])
    _write_tokens(words, segments, segment_W, chunk_W, cut)
    done_W = group_W * cut.item_tiles
    words[:, FIRST_TILE] = first_U[unit_W] + done_W
    words[:, NUM_TILES] = np.minimum(tiles_U[unit_W] - done_W, cut.item_tiles)
    words[:, COLUMN] = done_W * MAX_TILE_RANKS
    words[:, SITE] = unit_W // max(ranges.shape[1], 1)


def write_expand(
    items: Items, words: Array, segments: Array, ranges: Array, gain_offset: Array, cut: Cut
) -> None:
    """Fill `words` [W, ITEM_WORDS] int32; gains are numbered as `pairs_of_gains` orders them."""
    unit_W, segment_W, index_W = items.spread()
    _write_tokens(words, segments, segment_W, index_W, cut)
    words[:, FIRST_TILE] = ranges[:, :, 0].reshape(-1)[unit_W]
    words[:, NUM_TILES] = count_tiles(ranges).reshape(-1)[unit_W]
    has_gains_U = _has_gains(gain_offset).reshape(-1)
    words[:, GAIN] = -1
    if has_gains_U.any():
        words[:, GAIN] = np.where(has_gains_U, np.cumsum(has_gains_U) - 1, -1)[unit_W]


def pairs_of_gains(gain_offset: Array) -> Array:
    """The offsets of g and of c of the units that have one: [pairs, 2] int64."""
    pairs: Array = gain_offset[_has_gains(gain_offset)]
    return pairs


def _has_gains(gain_offset: Array) -> Array:
    has_MG: Array = np.maximum(gain_offset[:, :, 0], gain_offset[:, :, 1]) >= 0
    return has_MG


def _chunks(segments: Array, item_tokens: int) -> Array:
    return _ceil_divide(np.diff(segments), item_tokens)[None]


def _write_tokens(
    words: Array, segments: Array, segment_W: Array, chunk_W: Array, cut: Cut
) -> None:
    first_W = segments[:-1][segment_W] + chunk_W * cut.item_tokens
    words[:, FIRST_TOKEN] = first_W
    words[:, NUM_TOKENS] = np.minimum(segments[1:][segment_W] - first_W, cut.item_tokens)


def _ceil_divide(amounts: Array, unit: int) -> Array:
    return amounts if unit == 1 else (amounts + (unit - 1)) // unit
