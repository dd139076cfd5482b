"""Tiles of resident adapters: writes their bytes into pages and builds a batch's TileTable.

Knows where each resident adapter's tiles lie; does not decide who is resident (AdapterCache does).
Called by the model runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraswarm.adapters.adapter import Adapter
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.sequence import AdapterKey
from loraswarm.kernels import TileTable
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.page_buffer import PageBuffer

Segment = tuple[AdapterKey | None, int]


@dataclass(frozen=True, slots=True)
class _AdapterTiles:
    """One adapter's part of a tile table; `starts[m] : starts[m + 1]` are its tiles at site m."""

    starts: np.ndarray
    a_offset: np.ndarray
    bt_offset: np.ndarray
    ranks: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True, slots=True)
class _Joined:
    """The arrays of several adapters one after the other, for the adapters of one batch."""

    ranges: Tensor
    a_offset: Tensor
    bt_offset: Tensor
    ranks: Tensor
    scale: Tensor
    max_tiles: tuple[int, ...]


class TileStore:
    """Tile offsets of every resident adapter, over one page buffer."""

    def __init__(self, buffer: PageBuffer, shape: BaseShape) -> None:
        self._buffer = buffer
        self._num_sites = shape.num_sites()
        self._tiles: dict[AdapterKey, _AdapterTiles] = {}
        self._joined_keys: tuple[AdapterKey | None, ...] = ()
        self._joined: _Joined | None = None

    def load(self, load: AdapterLoad, adapter: Adapter) -> None:
        """Write the adapter's tiles into the pages of `load` and remember where they are."""
        weights = {module.info.site: module for module in adapter.modules}
        rows: list[tuple[int, int, int, float]] = []
        for tile in load.layout.tiles:
            module = weights[tile.site]
            ranks = slice(tile.first_rank, tile.first_rank + tile.num_ranks)
            a_offset = self._buffer.write(
                load.pages[tile.a_page], tile.a_element, module.a_RI[ranks]
            )
            bt_offset = self._buffer.write(
                load.pages[tile.bt_page], tile.bt_element, module.bt_RO[ranks]
            )
            rows.append((a_offset, bt_offset, tile.num_ranks, module.info.scale))
        sites = np.array([tile.site for tile in load.layout.tiles])
        a_offset_N, bt_offset_N, ranks_N, scale_N = zip(*rows, strict=True)
        self._tiles[load.info.key] = _AdapterTiles(
            starts=np.searchsorted(sites, np.arange(self._num_sites + 1)),
            a_offset=np.array(a_offset_N, dtype=np.int64),
            bt_offset=np.array(bt_offset_N, dtype=np.int64),
            ranks=np.array(ranks_N, dtype=np.int32),
            scale=np.array(scale_N, dtype=np.float32),
        )
        self._joined = None

    def drop(self, key: AdapterKey) -> None:
        """Forget an evicted adapter."""
        self._tiles.pop(key, None)
        self._joined = None

    def table(self, segments: Sequence[Segment]) -> TileTable | None:
        """The tile table of a batch whose token runs belong to these adapters, in order.

        None if no segment has an adapter. Adapters must be loaded; a batch with the same adapters
        in the same order as the last one reuses its arrays.
        """
        keys = tuple(key for key, _ in segments)
        if all(key is None for key in keys):
            return None
        if self._joined is None or keys != self._joined_keys:
            self._joined, self._joined_keys = self._join(keys), keys
        bounds = np.zeros(len(segments) + 1, dtype=np.int32)
        np.cumsum([num_tokens for _, num_tokens in segments], out=bounds[1:])
        joined = self._joined
        return TileTable(
            segments=self._to_device(bounds),
            ranges=joined.ranges,
            a_offset=joined.a_offset,
            bt_offset=joined.bt_offset,
            ranks=joined.ranks,
            scale=joined.scale,
            max_tiles=joined.max_tiles,
        )

    def _join(self, keys: Sequence[AdapterKey | None]) -> _Joined:
        ranges = np.zeros((self._num_sites, len(keys), 2), dtype=np.int32)
        parts = []
        num_tiles = 0
        for segment, key in enumerate(keys):
            if key is None:
                continue
            tiles = self._tiles[key]
            ranges[:, segment, 0] = tiles.starts[:-1] + num_tiles
            ranges[:, segment, 1] = tiles.starts[1:] + num_tiles
            num_tiles += len(tiles.ranks)
            parts.append(tiles)
        most_tiles = (ranges[:, :, 1] - ranges[:, :, 0]).max(axis=1)
        return _Joined(
            ranges=self._to_device(ranges),
            a_offset=self._to_device(np.concatenate([tiles.a_offset for tiles in parts])),
            bt_offset=self._to_device(np.concatenate([tiles.bt_offset for tiles in parts])),
            ranks=self._to_device(np.concatenate([tiles.ranks for tiles in parts])),
            scale=self._to_device(np.concatenate([tiles.scale for tiles in parts])),
            max_tiles=tuple(most_tiles.tolist()),
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._buffer.pool.device)
