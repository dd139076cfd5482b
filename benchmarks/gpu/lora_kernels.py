"""Shrink, expand and both: against a loop of torch, gather and batched products, and the bytes.

One linear of 4096 to 4096, one token a request. Used by run.
Legend: T tokens, I in features, O out features, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from ceilings import Ceilings
from swarm import POPULARITIES, Sites, segments_of
from timing import median_s
from torch import Tensor

from loraswarm.kernels import TileTable, triton

SIZE = 4096
RANKS = (8, 16, 32, 64)
BATCHES = (1, 8, 32, 64, 128)
ELEMENT_BYTES = 2


def measure_kernels(ceilings: Ceilings, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for every rank, batch and popularity: microseconds, and shares of what the bytes take.

    The bytes are the adapters', and those of the rows that are read and written.
    """
    for rank in RANKS:
        sites = Sites([(SIZE, SIZE)])
        for adapter in range(max(BATCHES)):
            sites.add(adapter, rank)
        pool = torch.randn(sites.end, device=device).to(torch.bfloat16)
        for batch in BATCHES:
            for popularity in POPULARITIES:
                row = _measure(pool, sites, segments_of(popularity, batch), rank)
                half_bytes, row_bytes = row["bytes"] // 2, batch * SIZE * ELEMENT_BYTES
                shrink_us = ceilings.bytes_us(half_bytes + row_bytes)
                expand_us = ceilings.bytes_us(half_bytes + 2 * row_bytes)
                shares = {
                    "shrink_share": shrink_us / row["shrink_us"],
                    "expand_share": expand_us / row["expand_us"],
                    "both_share": (shrink_us + expand_us) / row["both_us"],
                }
                yield {"rank": rank, "batch": batch, "popularity": popularity} | row | shares


def _measure(
    pool: Tensor, sites: Sites, segments: Sequence[tuple[int | None, int]], rank: int
) -> dict[str, Any]:
    num_tokens = sum(count for _, count in segments)
    x_TI = torch.randn(num_tokens, SIZE, device=pool.device).to(torch.bfloat16)
    y_TO = torch.randn_like(x_TI)
    tiles = sites.table(segments)
    bounds = (0, SIZE)

    def shrink() -> Tensor:
        return triton.lora_shrink(x_TI, pool, tiles, 0, 1)

    h_QTR = shrink()

    def expand() -> None:
        triton.lora_expand_(y_TO, h_QTR, pool, tiles, 0, bounds)

    def both() -> None:
        triton.lora_expand_(y_TO, shrink(), pool, tiles, 0, bounds)

    a_NRI, b_NRO = _stacked(pool, tiles, segments, rank)
    owner_T = torch.repeat_interleave(
        torch.arange(len(segments)), torch.tensor([count for _, count in segments])
    ).to(pool.device)
    adapters = [adapter for adapter, _ in segments if adapter is not None]
    looped = _looped(x_TI, y_TO, (a_NRI, b_NRO), segments)
    return {
        "num_adapters": len(adapters),
        "bytes": sum(sites.tile_bytes(adapter) for adapter in adapters),
        "difference": _difference(y_TO, both, looped),
        "shrink_us": median_s(shrink) * 1e6,
        "expand_us": median_s(expand) * 1e6,
        "both_us": median_s(both) * 1e6,
        "gather_us": median_s(_gathered(x_TI, y_TO, (a_NRI, b_NRO), owner_T)) * 1e6,
        "loop_us": median_s(looped, num_runs=5) * 1e6,
    }


def _difference(y_TO: Tensor, ours: Callable[[], None], theirs: Callable[[], None]) -> float:
    """The largest between what both make of y, over the largest element; y is as before."""
    before_TO, results = y_TO.clone(), []
    for update in (ours, theirs):
        update()
        results.append(y_TO.float())
        y_TO.copy_(before_TO)
    return float((results[0] - results[1]).abs().max() / results[1].abs().max())


def _stacked(
    pool: Tensor, tiles: TileTable, segments: Sequence[tuple[int | None, int]], rank: int
) -> tuple[Tensor, Tensor]:
    """A [N, R, I] and Bt [N, R, O] of the adapters, copied out of the pool."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first, last in tiles.ranges[0].tolist():
        for offsets, matrices in zip((tiles.a_offset, tiles.bt_offset), found, strict=True):
            parts = [
                pool[int(offsets[tile]) :][: int(tiles.ranks[tile]) * SIZE].view(-1, SIZE)
                for tile in range(first, last)
            ]
            matrices.append(torch.cat(parts))
    assert found[0][0].shape == (rank, SIZE)
    assert len(found[0]) == len(segments)
    return torch.stack(found[0]), torch.stack(found[1])


def _gathered(
    x_TI: Tensor, y_TO: Tensor, matrices: tuple[Tensor, Tensor], owner_T: Tensor
) -> Callable[[], None]:
    """A copy of each token's matrices, and one batched product with them after the other."""
    a_NRI, b_NRO = matrices

    def run() -> None:
        h_T1R = torch.bmm(x_TI[:, None], a_NRI[owner_T].transpose(1, 2))
        y_TO.add_(torch.bmm(h_T1R, b_NRO[owner_T])[:, 0], alpha=0.5)

    return run


def _looped(
    x_TI: Tensor,
    y_TO: Tensor,
    matrices: tuple[Tensor, Tensor],
    segments: Sequence[tuple[int | None, int]],
) -> Callable[[], None]:
    """Two products for each adapter."""

    def run() -> None:
        begin = 0
        for index, (_, count) in enumerate(segments):
            tokens = slice(begin, begin + count)
            h_TR = x_TI[tokens] @ matrices[0][index].T
            y_TO[tokens].addmm_(h_TR, matrices[1][index], alpha=0.5)
            begin += count

    return run
