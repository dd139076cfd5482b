"""Tile tables over a pool of random numbers: adapters without files.

Every adapter lies in bytes of its own, block after block, as TileStore would put them. Used by the
other scripts here.
Legend: I in features, O out features, R ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from loraswarm.kernels import MAX_TILE_RANKS, TileTable

ALIGNMENT = 32  # elements: 64 bytes of a 16-bit dtype
POPULARITIES = ("distinct", "uniform", "zipf", "identical")
ZIPF = 1.5


@dataclass
class Sites:
    """(in, out) features of each site, and where each adapter's tiles are in the pool; none are at
    a site of no features."""

    sizes: Sequence[tuple[int, int]]
    first_element: int = 0
    _adapters: dict[int, list[list[tuple[int, int, int]]]] = field(default_factory=dict)
    end: int = 0

    def __post_init__(self) -> None:
        self.end = self.first_element

    def add(self, adapter: int, rank: int) -> None:
        """Give an adapter of this rank its place, at every site."""
        self._adapters[adapter] = [self._tiles(rank, *size) for size in self.sizes]

    def tile_bytes(self, adapter: int) -> int:
        """Bytes of A and B at all sites, of a 16-bit dtype."""
        sites = zip(self._adapters[adapter], self.sizes, strict=True)
        return sum(2 * rank * sum(size) for tiles, size in sites for _, _, rank in tiles)

    def table(self, segments: Sequence[tuple[int | None, int]]) -> TileTable:
        """For adjacent (adapter or None, number of tokens)."""
        columns: dict[str, list[int]] = {name: [] for name in ("a", "bt", "a_w", "bt_w", "rank")}
        ranges = torch.zeros(len(self.sizes), len(segments), 2, dtype=torch.int32)
        for site, (in_size, out_size) in enumerate(self.sizes):
            for index, (adapter, _) in enumerate(segments):
                first = len(columns["a"])
                for a, bt, rank in self._adapters[adapter][site] if adapter is not None else ():
                    for name, value in zip(columns, (a, bt, in_size, out_size, rank), strict=True):
                        columns[name].append(value)
                ranges[site, index] = torch.tensor([first, len(columns["a"])])
        counts = [0]
        for _, num_tokens in segments:
            counts.append(counts[-1] + num_tokens)
        num_tiles = len(columns["a"])
        return TileTable(
            segments=torch.tensor(counts, dtype=torch.int32),
            ranges=ranges,
            a_offset=torch.tensor(columns["a"]),
            bt_offset=torch.tensor(columns["bt"]),
            a_stride=torch.tensor(columns["a_w"]),
            bt_stride=torch.tensor(columns["bt_w"]),
            ranks=torch.tensor(columns["rank"], dtype=torch.int32),
            scale=torch.full((num_tiles,), 0.5),
            u_offset=torch.full((num_tiles,), -1),
            v_offset=torch.full((num_tiles,), -1),
            gain_offset=torch.full((len(self.sizes), len(segments), 2), -1),
            max_tiles=tuple((ranges[:, :, 1] - ranges[:, :, 0]).amax(dim=1).tolist()),
            has_gains=(False,) * len(self.sizes),
        )

    def _tiles(self, rank: int, in_size: int, out_size: int) -> list[tuple[int, int, int]]:
        """(offset of A, offset of Bt, ranks) of each tile; none where there are no features."""
        tiles = []
        if in_size == 0:
            return tiles
        for first in range(0, rank, MAX_TILE_RANKS):
            ranks = min(rank - first, MAX_TILE_RANKS)
            a, self.end = self.end, self.end + _aligned(ranks * in_size)
            bt, self.end = self.end, self.end + _aligned(ranks * out_size)
            tiles.append((a, bt, ranks))
        return tiles


def _aligned(num_elements: int) -> int:
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


def segments_of(popularity: str, num_tokens: int, seed: int = 0) -> list[tuple[int | None, int]]:
    """One token a request; requests of one adapter are adjacent."""
    chance = random.Random(seed)
    if popularity == "distinct":
        owners = list(range(num_tokens))
    elif popularity == "identical":
        owners = [0] * num_tokens
    elif popularity == "uniform":
        owners = [chance.randrange(num_tokens) for _ in range(num_tokens)]
    else:
        weights = [1 / (index + 1) ** ZIPF for index in range(num_tokens)]
        owners = chance.choices(range(num_tokens), weights, k=num_tokens)
    found: dict[int | None, int] = {}
    for owner in sorted(owners):
        found[owner] = found.get(owner, 0) + 1
    return list(found.items())
