"""Lays LoRA matrices out as tiles in a flat pool and builds the tile table by hand.

The plain twin of memory's tile store: one list of tiles, no pages, no eviction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, TileTable


@dataclass(frozen=True)
class SiteWeights:
    """A [rank, in], B [out, rank] and the factor of one site of one adapter."""

    a: Tensor
    b: Tensor
    scale: float


class TilePool:
    """Adapters by name, as tiles in one tensor of `dtype`."""

    def __init__(self, adapters: Mapping[str, Mapping[int, SiteWeights]], dtype: torch.dtype):
        self._pieces: list[Tensor] = [torch.full((7,), float("nan"), dtype=dtype)]
        self._num_elements = 7
        self._tiles: dict[str, dict[int, list[tuple[int, int, int, float]]]] = {}
        for name, sites in adapters.items():
            self._tiles[name] = {site: self._add(weights) for site, weights in sites.items()}
        self.pool = torch.cat(self._pieces)

    def table(self, num_sites: int, segments: Sequence[tuple[str | None, int]]) -> TileTable:
        """For adjacent segments of (adapter or None, number of tokens)."""
        bounds = [0]
        for _, num_tokens in segments:
            bounds.append(bounds[-1] + num_tokens)
        ranges = torch.zeros(num_sites, len(segments), 2, dtype=torch.int32)
        tiles: list[tuple[int, int, int, float]] = []
        for site in range(num_sites):
            for segment, (name, _) in enumerate(segments):
                first = len(tiles)
                tiles += self._tiles[name].get(site, []) if name is not None else []
                ranges[site, segment] = torch.tensor([first, len(tiles)])
        counts = ranges[:, :, 1] - ranges[:, :, 0]
        a_offsets, bt_offsets, ranks, scales = zip(*tiles, strict=True)
        return TileTable(
            segments=torch.tensor(bounds, dtype=torch.int32),
            ranges=ranges,
            a_offset=torch.tensor(a_offsets),
            bt_offset=torch.tensor(bt_offsets),
            ranks=torch.tensor(ranks, dtype=torch.int32),
            scale=torch.tensor(scales, dtype=torch.float32),
            max_tiles=tuple(counts.amax(dim=1).tolist()),
        )

    def _add(self, weights: SiteWeights) -> list[tuple[int, int, int, float]]:
        tiles = []
        for first in range(0, weights.a.shape[0], MAX_TILE_RANKS):
            a_RI = weights.a[first : first + MAX_TILE_RANKS]
            bt_RO = weights.b[:, first : first + MAX_TILE_RANKS].T
            offsets = self._append(a_RI), self._append(bt_RO)
            tiles.append((*offsets, a_RI.shape[0], weights.scale))
        return tiles

    def _append(self, block: Tensor) -> int:
        offset = self._num_elements
        self._pieces.append(block.reshape(-1).to(self._pieces[0].dtype))
        self._num_elements += block.numel()
        return offset
