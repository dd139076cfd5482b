"""Resident adapters in the pool: writes their bytes and builds a batch's TileTable and overlays.

Knows where each resident adapter's blocks lie; does not decide who is resident (AdapterCache does).
Called by the model runner and engine/prepare.
Legend: N tiles, F references to blocks (see tile_layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from loraswarm.adapters.adapter import EMBEDDING_A, Adapter
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.sequence import AdapterKey, AdapterMix
from loraswarm.kernels import MAX_TILE_RANKS, TileTable
from loraswarm.kernels.overlay import Overlay, Overlays, PagedRows
from loraswarm.memory.adapter_cache import AdapterLoad, SharedPlace
from loraswarm.memory.image import AdapterImage, pack_adapter
from loraswarm.memory.packing import Packing
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_join import (
    NO_VECTOR,
    AdapterTiles,
    TileColumns,
    join,
    signed_sum,
    weighted_sum,
)
from loraswarm.memory.tile_layout import NOTHING

Segment = tuple[AdapterMix, int]
MergedSites = tuple[AdapterKey | None, ...]
"""By site of the linears, the adapter whose tiles are in the weight in use; () if none is."""
MAX_KEPT = 4
MAX_KEPT_SUMS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class _OverlayPlace:
    """One overlay of a resident adapter and the modules whose weight it stands in for."""

    paths: tuple[str, ...]
    rows: PagedRows
    token_ids: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Resident:
    """Where everything of one adapter is."""

    tiles: AdapterTiles
    overlays: tuple[_OverlayPlace, ...]


class TileStore:
    """Tiles and overlays of every resident adapter, over one page buffer.

    A segment is a run of tokens and what acts on them: () the base, one adapter of weight 1, or a
    weighted sum of adapters that neither have gains nor replace weights.

    Where an adapter is merged into a weight, every token gets its update without asking. So there
    the weight of that adapter is one less in each segment's sum: nothing is left of it for tokens
    that have it alone, all others subtract it. Gains, biases, overlays, embedding and lm_head are
    never merged.
    """

    def __init__(self, buffer: PageBuffer, shape: BaseShape) -> None:
        self._buffer = buffer
        self._shape = shape
        self._num_sites = shape.num_sites()
        self._residents: dict[AdapterKey, _Resident] = {}
        self._written: WeakSet[SharedPlace] = WeakSet()
        self._joined_mixes: tuple[AdapterMix, ...] = ()
        self._joined: TileTable | None = None
        self._tables: dict[tuple[Segment, ...], TileTable] = {}
        self._overlays: dict[tuple[Segment, ...], Overlays] = {}
        self._merged: MergedSites = ()
        self._sums: dict[AdapterMix, AdapterTiles | None] = {}

    def load(self, load: AdapterLoad, adapter: Adapter) -> None:
        """Pack an adapter, copy it into its pages and place it, all at once."""
        self.copy(load, pack_adapter(adapter, self._shape, self._buffer.geometry, _empty))
        self.place(load)

    def copy(self, load: AdapterLoad, image: AdapterImage) -> int:
        """Copy an image into the pages of its load, with the shared matrices not written yet.

        Returns the bytes copied. May run in another thread than the rest, one copy at a time.
        """
        places = self.unwritten(load)
        num_bytes = image.num_bytes
        try:
            for place in places:
                matrix = image.shared[place.matrix]
                self._buffer.copy_pieces(matrix, place.layout.packing, place.starts)
                num_bytes += matrix.nbytes
        except BaseException:
            self._written.difference_update(places)
            raise
        self._buffer.copy_pieces(image.own, load.layout.packing, load.starts)
        return num_bytes

    def unwritten(self, load: AdapterLoad) -> tuple[SharedPlace, ...]:
        """The places of shared matrices to write with this load; each is handed out once."""
        places = tuple(place for place in load.shared if place not in self._written)
        self._written.update(places)
        return places

    def place(self, load: AdapterLoad) -> None:
        """Remember where the adapter is, once its bytes are there."""
        own_offsets = _block_offsets(load.layout.packing, load.starts)
        offset_F = np.array(
            [
                *(
                    offset
                    for place in load.shared
                    for offset in _block_offsets(place.layout.packing, place.starts)
                ),
                *own_offsets,
                0,
            ],
            dtype=np.int64,
        )
        self._residents[load.info.key] = _Resident(
            self._tiles(load, offset_F), self._overlay_places(load, offset_F)
        )
        self._forget_batch()

    def drop(self, key: AdapterKey) -> None:
        """Forget an evicted adapter, which must not be merged into a weight in use."""
        self._residents.pop(key, None)
        self._forget_batch()

    def own_table(self, key: AdapterKey) -> TileTable | None:
        """The tiles of one adapter, as the one segment of a table, for merging them.

        None if it has none at any linear.
        """
        tiles = self._residents[key].tiles
        if tiles.starts[self._shape.num_linears] == 0:
            return None
        return replace(_table(self._num_sites, [tiles]), segments=_bounds([1]))

    def no_tiles(self) -> TileTable:
        """The table of one adapter that changes nothing."""
        return replace(_table(self._num_sites, [None]), segments=_bounds([1]))

    def table(self, segments: Sequence[Segment], merged: MergedSites = ()) -> TileTable | None:
        """The tile table of a batch whose token runs belong to these adapters, in order, over
        weights in which `merged` is.

        None if no segment has tiles or gains. Adapters must be loaded; a batch with the same mixes
        in the same order as the last one reuses its arrays, whatever the numbers of tokens. While
        segments and `merged` stay the same, as they do in decode, so does the table.
        """
        if merged != self._merged:
            self._merged = merged
            self._sums.clear()
            self._forget_tables()
        key = tuple(segments)
        if key in self._tables:
            return self._tables[key]
        mixes = tuple(mix for mix, _ in segments)
        if mixes != self._joined_mixes:
            self._joined, self._joined_mixes = self._join(mixes), mixes
        if self._joined is None:
            return None
        if len(self._tables) == MAX_KEPT:
            self._tables.clear()
        bounds = _bounds([num_tokens for _, num_tokens in segments])
        self._tables[key] = replace(self._joined, segments=bounds)
        return self._tables[key]

    def overlays(self, segments: Sequence[Segment]) -> Overlays:
        """The overlays of a batch whose token runs belong to these adapters, in order.

        Empty if no segment has any. Kept while segments stay the same, as they do in decode.
        """
        key = tuple(segments)
        if key not in self._overlays:
            if len(self._overlays) == MAX_KEPT:
                self._overlays.clear()
            self._overlays[key] = self._find_overlays(key)
        return self._overlays[key]

    def _tiles(self, load: AdapterLoad, offset_F: np.ndarray) -> AdapterTiles:
        """The adapter's tiles; `offset_F` has the offset of each reference, 0 for NOTHING."""
        tiles, width_F = load.layout.tiles, load.layout.widths
        float_F = offset_F // self._buffer.geometry.float32_elements
        float_F[NOTHING] = NO_VECTOR
        scale_M = np.array([module.scale for module in load.info.modules], dtype=np.float32)
        u_N = float_F[tiles.u_refs]
        return AdapterTiles(
            starts=np.searchsorted(tiles.sites, np.arange(self._num_sites + 1)),
            columns=TileColumns(
                a_offset=offset_F[tiles.a_refs],
                bt_offset=offset_F[tiles.bt_refs],
                a_stride=width_F[tiles.a_refs],
                bt_stride=width_F[tiles.bt_refs],
                ranks=tiles.num_ranks.astype(np.int32),
                scale=scale_M[tiles.modules],
                u_offset=np.where(u_N == NO_VECTOR, NO_VECTOR, u_N + tiles.first_ranks),
                v_offset=float_F[tiles.v_refs],
            ),
            gain_offset=float_F[tiles.gain_refs],
        )

    def _overlay_places(self, load: AdapterLoad, offset_F: np.ndarray) -> tuple[_OverlayPlace, ...]:
        places = []
        for info, blocks in zip(load.info.overlays, load.layout.overlays, strict=True):
            offsets = offset_F[blocks.refs]
            rows = PagedRows(
                offsets=self._to_device(offsets),
                block_offsets=tuple(offsets.tolist()),
                rows_per_block=blocks.rows_per_block,
                num_rows=info.num_rows,
                width=info.width,
            )
            ids = None
            if info.token_ids is not None:
                ids = self._to_device(np.array(info.token_ids, dtype=np.int64))
            places.append(_OverlayPlace(info.paths, rows, ids))
        return tuple(places)

    def _join(self, mixes: tuple[AdapterMix, ...]) -> TileTable | None:
        """The table of segments of these mixes, without the segments' bounds."""
        sums = {mix: self._sum(mix) for mix in dict.fromkeys(mixes)}
        if not any(tiles and (tiles.num_tiles or tiles.has_gains) for tiles in sums.values()):
            return None
        return _table(self._num_sites, [sums[mix] for mix in mixes])

    def _sum(self, mix: AdapterMix) -> AdapterTiles | None:
        """What tokens of a mix add to the weights in use; None: nothing."""
        if not self._merged:
            return self._plain_sum(mix)
        if mix not in self._sums:
            if len(self._sums) == MAX_KEPT_SUMS:
                self._sums.clear()
            self._sums[mix] = self._signed_sum(mix)
        return self._sums[mix]

    def _plain_sum(self, mix: AdapterMix) -> AdapterTiles | None:
        if not mix:
            return None
        residents = [(self._residents[key], weight) for key, weight in mix]
        is_single = len(mix) == 1 and mix[0][1] == 1.0
        paths = {path for resident, _ in residents for o in resident.overlays for path in o.paths}
        assert is_single or paths <= {EMBEDDING_A}, "adapters that replace weights are never summed"
        return weighted_sum([(resident.tiles, weight) for resident, weight in residents])

    def _signed_sum(self, mix: AdapterMix) -> AdapterTiles | None:
        """By site the weight of each adapter, less one where it is merged."""
        weights: dict[AdapterKey, np.ndarray] = {}
        for key, weight in mix:
            weights[key] = weights.get(key, 0) + np.full(self._num_sites, weight, np.float32)
        sites: dict[AdapterKey, list[int]] = {}
        for site, merged_key in enumerate(self._merged):
            if merged_key is not None:
                sites.setdefault(merged_key, []).append(site)
        for key, merged_sites in sites.items():
            if key in weights:
                left = weights[key][merged_sites] - 1
                weights[key][merged_sites] = np.where(left == 0, np.nan, left)
            else:
                weights[key] = np.full(self._num_sites, np.nan, np.float32)
                weights[key][merged_sites] = -1
        terms = [(self._residents[key].tiles, weight_M) for key, weight_M in weights.items()]
        return signed_sum(self._plain_sum(mix), terms)

    def _find_overlays(self, segments: tuple[Segment, ...]) -> Overlays:
        found: dict[str, list[Overlay]] = {}
        end = 0
        for mix, num_tokens in segments:
            begin, end = end, end + num_tokens
            if num_tokens == 0:
                continue
            column = 0
            for place in (p for key, _ in mix for p in self._residents[key].overlays):
                overlay = Overlay(begin, end, place.rows, place.token_ids, column)
                for path in place.paths:
                    found.setdefault(path, []).append(overlay)
                if EMBEDDING_A in place.paths:
                    column += -(-place.rows.width // MAX_TILE_RANKS) * MAX_TILE_RANKS
        return {path: tuple(overlays) for path, overlays in found.items()}

    def _forget_batch(self) -> None:
        self._overlays.clear()
        self._sums.clear()
        self._forget_tables()

    def _forget_tables(self) -> None:
        self._joined, self._joined_mixes = None, ()
        self._tables.clear()

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._buffer.pool.device)


def _table(num_sites: int, segments: Sequence[AdapterTiles | None]) -> TileTable:
    """The table of segments that run these tiles, without the segments' bounds; some has tiles or
    gains."""
    joined = join(num_sites, segments)
    num_tiles = joined.ranges[:, :, 1] - joined.ranges[:, :, 0]
    has_gains = (joined.gain_offset != NO_VECTOR).any(axis=(1, 2))
    columns = {name: torch.from_numpy(column) for name, column in joined.columns._asdict().items()}
    return TileTable(
        segments=torch.empty(0, dtype=torch.int32),
        ranges=torch.from_numpy(joined.ranges),
        gain_offset=torch.from_numpy(joined.gain_offset),
        max_tiles=tuple(num_tiles.max(axis=1).tolist()),
        has_gains=tuple(has_gains.tolist()),
        **columns,
    )


def _bounds(num_tokens: Sequence[int]) -> Tensor:
    """Where each segment begins, and the end."""
    bounds = np.zeros(len(num_tokens) + 1, dtype=np.int32)
    np.cumsum(num_tokens, out=bounds[1:])
    return torch.from_numpy(bounds)


def _block_offsets(packing: Packing, starts: Sequence[int]) -> list[int]:
    """Where each block begins, in elements of the pool."""
    return [starts[piece] + element for piece, element in packing.places]


def _empty(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes, dtype=np.uint8)
