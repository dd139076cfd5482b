"""Tiles of one adapter, of a weighted sum of adapters, and of a batch: arrays put end to end.

Pure functions on numpy arrays and plain data; knows no pages. Called by TileStore.
Legend: N tiles, G segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NO_VECTOR = -1


class TileColumns(NamedTuple):
    """Of tiles one after the other, what `kernels.TileTable` has of each. All [N]."""

    a_offset: np.ndarray
    bt_offset: np.ndarray
    a_stride: np.ndarray
    bt_stride: np.ndarray
    ranks: np.ndarray
    scale: np.ndarray
    u_offset: np.ndarray
    v_offset: np.ndarray


NO_TILES = TileColumns(
    **dict.fromkeys(TileColumns._fields, np.empty(0, dtype=np.int64))
    | {"ranks": np.empty(0, dtype=np.int32), "scale": np.empty(0, dtype=np.float32)}
)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterTiles:
    """What an adapter, or a sum of them, does to a segment of tokens.

    Tiles are ordered by site: `starts[m] : starts[m + 1]` are those of site m.
    Shapes    starts [sites + 1] int64; gain_offset [sites, 2] int64: of g and of c.
    """

    starts: np.ndarray
    columns: TileColumns
    gain_offset: np.ndarray

    @property
    def num_tiles(self) -> int:
        return int(self.starts[-1])

    @property
    def has_gains(self) -> bool:
        return bool((self.gain_offset != NO_VECTOR).any())


@dataclass(frozen=True, slots=True, eq=False)
class BatchTiles:
    """The tiles of several segments; ranges and gain_offset [sites, G, 2], else as AdapterTiles."""

    ranges: np.ndarray
    columns: TileColumns
    gain_offset: np.ndarray


def weighted_sum(terms: Sequence[tuple[AdapterTiles, float]]) -> AdapterTiles:
    """One adapter as it is, or the sum of several: each tile's scale times its adapter's weight.

    Gains multiply what the base computes, so they cannot be summed; the engine refuses that.
    """
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    assert not any(tiles.has_gains for tiles, _ in terms), "adapters with gains cannot be summed"
    num_sites = len(terms[0][0].gain_offset)
    site_N = np.concatenate(
        [np.repeat(np.arange(num_sites), np.diff(tiles.starts)) for tiles, _ in terms]
    )
    order_N = np.argsort(site_N, kind="stable")
    columns = _concatenated(
        [
            tiles.columns._replace(scale=tiles.columns.scale * np.float32(weight))
            for tiles, weight in terms
        ]
    )
    return AdapterTiles(
        starts=np.sum([tiles.starts for tiles, _ in terms], axis=0),
        columns=TileColumns(*(column[order_N] for column in columns)),
        gain_offset=terms[0][0].gain_offset,
    )


def signed_sum(
    own: AdapterTiles | None, terms: Sequence[tuple[AdapterTiles, np.ndarray]]
) -> AdapterTiles | None:
    """What is left for tokens to add where weights are merged: at each site the sum of the tiles of
    each term times its weight there.

    `terms` are (tiles, weight by site [sites] float32, NaN where the term has none). Gains
    are those of `own`: nothing merges them. None if nothing is left.
    """
    kept = [_weighted(tiles, weight_M) for tiles, weight_M in terms]
    kept = [(site_N, columns) for site_N, columns in kept if site_N.size]
    gain_offset = None if own is None else own.gain_offset
    if not kept:
        if own is None or not own.has_gains:
            return None
        return AdapterTiles(np.zeros_like(own.starts), _none_of(own.columns), own.gain_offset)
    site_N = np.concatenate([site_N for site_N, _ in kept])
    num_sites = len(terms[0][1])
    if gain_offset is None:
        gain_offset = np.full((num_sites, 2), NO_VECTOR)
    order_N = np.argsort(site_N, kind="stable")
    columns = _concatenated([columns for _, columns in kept])
    return AdapterTiles(
        starts=np.searchsorted(site_N[order_N], np.arange(num_sites + 1)),
        columns=TileColumns(*(column[order_N] for column in columns)),
        gain_offset=gain_offset,
    )


def _weighted(tiles: AdapterTiles, weight_M: np.ndarray) -> tuple[np.ndarray, TileColumns]:
    """The sites and columns of the tiles that have a weight, times it."""
    site_N = np.repeat(np.arange(len(weight_M)), np.diff(tiles.starts))
    weight_N = weight_M[site_N]
    columns = tiles.columns._replace(scale=tiles.columns.scale * weight_N)
    is_kept_N = ~np.isnan(weight_N)
    if is_kept_N.all():
        return site_N, columns
    return site_N[is_kept_N], TileColumns(*(column[is_kept_N] for column in columns))


def _none_of(columns: TileColumns) -> TileColumns:
    return TileColumns(*(column[:0] for column in columns))


def join(num_sites: int, segments: Sequence[AdapterTiles | None]) -> BatchTiles:
    """The tiles of each segment (None: the base); segments of the same object share theirs."""
    ranges = np.zeros((num_sites, len(segments), 2), dtype=np.int32)
    gain_offset = np.full((num_sites, len(segments), 2), NO_VECTOR)
    first_tiles: dict[int, int] = {}
    parts: list[TileColumns] = []
    num_tiles = 0
    for segment, tiles in enumerate(segments):
        if tiles is None:
            continue
        if id(tiles) not in first_tiles:
            first_tiles[id(tiles)] = num_tiles
            num_tiles += tiles.num_tiles
            parts.append(tiles.columns)
        first_tile = first_tiles[id(tiles)]
        ranges[:, segment, 0] = tiles.starts[:-1] + first_tile
        ranges[:, segment, 1] = tiles.starts[1:] + first_tile
        gain_offset[:, segment] = tiles.gain_offset
    return BatchTiles(ranges, _concatenated(parts), gain_offset)


def _concatenated(parts: Sequence[TileColumns]) -> TileColumns:
    if not parts:
        return NO_TILES
    return TileColumns(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
