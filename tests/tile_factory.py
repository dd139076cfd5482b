"""Lays LoRA matrices and vectors out in a flat pool and builds the tile table by hand.

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
    """A [rank, in], B [out, rank], the factor and the vectors of one site of one adapter.

    A tensor given to several sites is stored once; its rows may be longer than the site uses. `a`
    and `b` are None where a site has gains only.
    """

    a: Tensor | None
    b: Tensor | None
    scale: float = 1.0
    u: Tensor | None = None
    v: Tensor | None = None
    g: Tensor | None = None
    c: Tensor | None = None


@dataclass(frozen=True)
class Tile:
    """One entry of each array of a table."""

    a_offset: int
    bt_offset: int
    a_stride: int
    bt_stride: int
    ranks: int
    scale: float
    u_offset: int
    v_offset: int


class TilePool:
    """Adapters by name, as tiles in one tensor of `dtype`; what belongs to no tile is NaN."""

    def __init__(self, adapters: Mapping[str, Mapping[int, SiteWeights]], dtype: torch.dtype):
        self._pieces: list[Tensor] = [torch.full((7,), float("nan"), dtype=dtype)]
        self._num_elements = 7
        self._offsets: dict[int, int] = {}
        self._tiles: dict[str, dict[int, list[Tile]]] = {}
        self._gains: dict[str, dict[int, tuple[int, int]]] = {}
        for name, sites in adapters.items():
            self._tiles[name] = {site: self._add(weights) for site, weights in sites.items()}
            self._gains[name] = {
                site: (self._append_floats(weights.g), self._append_floats(weights.c))
                for site, weights in sites.items()
            }
        self._align()
        self.pool = torch.cat(self._pieces)

    def table(
        self, num_sites: int, segments: Sequence[tuple[str | None, int] | tuple[str, int, str]]
    ) -> TileTable:
        """For adjacent segments of (adapter or None, number of tokens).

        A third entry names an adapter whose tiles the segment runs too, after the first one's;
        the gains are the first one's.
        """
        bounds = [0]
        for _, num_tokens, *_ in segments:
            bounds.append(bounds[-1] + num_tokens)
        ranges = torch.zeros(num_sites, len(segments), 2, dtype=torch.int32)
        gains = torch.full((num_sites, len(segments), 2), -1)
        tiles: list[Tile] = []
        for site in range(num_sites):
            for segment, (name, _, *others) in enumerate(segments):
                first = len(tiles)
                for adapter in () if name is None else (name, *others):
                    tiles += self._tiles[adapter].get(site, [])
                ranges[site, segment] = torch.tensor([first, len(tiles)])
                gains[site, segment] = torch.tensor(self._gains.get(name, {}).get(site, (-1, -1)))
        counts = ranges[:, :, 1] - ranges[:, :, 0]
        return TileTable(
            segments=torch.tensor(bounds, dtype=torch.int32),
            ranges=ranges,
            a_offset=_column(tiles, "a_offset"),
            bt_offset=_column(tiles, "bt_offset"),
            a_stride=_column(tiles, "a_stride"),
            bt_stride=_column(tiles, "bt_stride"),
            ranks=_column(tiles, "ranks", torch.int32),
            scale=_column(tiles, "scale", torch.float32),
            u_offset=_column(tiles, "u_offset"),
            v_offset=_column(tiles, "v_offset"),
            gain_offset=gains,
            max_tiles=tuple(counts.amax(dim=1).tolist()),
            has_gains=tuple((gains >= 0).flatten(1).any(dim=1).tolist()),
        )

    def _add(self, weights: SiteWeights) -> list[Tile]:
        if weights.a is None or weights.b is None:
            return []
        a_offset, a_stride = self._append(weights.a, weights.a), weights.a.shape[1]
        bt_offset, bt_stride = self._append(weights.b, weights.b.T), weights.b.shape[0]
        u_offset, v_offset = self._append_floats(weights.u), self._append_floats(weights.v)
        rank = weights.a.shape[0]
        return [
            Tile(
                a_offset=a_offset + first * a_stride,
                bt_offset=bt_offset + first * bt_stride,
                a_stride=a_stride,
                bt_stride=bt_stride,
                ranks=min(rank - first, MAX_TILE_RANKS),
                scale=weights.scale,
                u_offset=u_offset if u_offset < 0 else u_offset + first,
                v_offset=v_offset,
            )
            for first in range(0, rank, MAX_TILE_RANKS)
        ]

    def _append(self, key: Tensor, block: Tensor) -> int:
        """The offset of a block that is stored once for each tensor `key`, alive until the end."""
        if id(key) not in self._offsets:
            self._offsets[id(key)] = self._num_elements
            self._store(block)
        return self._offsets[id(key)]

    def _append_floats(self, vector: Tensor | None) -> int:
        if vector is None:
            return -1
        self._align()
        stored = vector.float().view(self._pieces[0].dtype)
        return self._append(vector, stored) * stored.element_size() // 4

    def _align(self) -> None:
        self._store(torch.full((self._num_elements % 2,), float("nan")))

    def _store(self, block: Tensor) -> None:
        self._pieces.append(block.reshape(-1).to(self._pieces[0].dtype))
        self._num_elements += block.numel()


def _column(tiles: Sequence[Tile], name: str, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([getattr(tile, name) for tile in tiles], dtype=dtype)
