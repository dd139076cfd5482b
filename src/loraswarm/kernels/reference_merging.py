"""Merging an adapter into a weight, in plain torch: what the fast kernel is tested against.

Runs on any device and for any float dtype; where no faster kernel exists it is what serves. Knows
no models. Exported by the backends; called by models/layers/merging.
Legend: see kernels/__init__; N the rows that are merged in one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from loraswarm.kernels import TileTable
from loraswarm.kernels.arguments import require
from loraswarm.kernels.pool_views import pool_rows, pool_vector

MERGE_ROWS = 32
"""Rows are merged in multiples of this: as many as the packed order of the CPU keeps together."""


def empty_linear(weight_OI: Tensor) -> Tensor:
    """Memory for what `merge_linear_` writes, without values: a weight packed as this one.

    The system has given it, so that the first to write it does not wait.
    """
    return torch.empty_like(weight_OI)


def merge_linear_(
    merged: Tensor,
    weight: Tensor,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
    rows: tuple[int, int],
) -> None:
    """Write some rows of a weight with the tiles of one adapter in it; the weight is only read.

    Semantics, for rows o in `rows` that part q has, rows out_bounds[q] : out_bounds[q + 1]:
        merged[o] = weight[o] + sum over the tiles n of the only segment at site first_site + q of
            v[n, o] * (Bt[n][:, o] @ (scale[n] * u[n] * A[n]))
    The table's gains g and c are not read: they stay with the rows of x that have the adapter.

    Shapes    merged, weight as `pack_linear` makes them (here [O, I]); pool [elements] of their
              dtype; tiles of one segment; out_bounds has Q + 1 ascending numbers, 0 to O; `rows`
              are the first and the end, multiples of MERGE_ROWS or the last of all.
    Numerics  everything in float32; one rounding, when merged is written: of the weight, by at most
              half a unit in the last place.
    Raises    ValueError naming the argument; nothing is written.
    Source    Hu et al. 2021 (LoRA), section 4.1: W + B A in the weight's place.
    """
    check_merge(weight.shape[0], tiles, first_site, out_bounds, rows)
    require(
        merged.shape == weight.shape and merged.dtype == weight.dtype,
        f"merged is {merged.dtype} {tuple(merged.shape)}; it must be as the weight is,"
        f" {weight.dtype} {tuple(weight.shape)}",
    )
    require(merged.data_ptr() != weight.data_ptr(), "merged is the weight itself")
    require(pool.dtype == weight.dtype, f"pool is {pool.dtype}, the weight is {weight.dtype}")
    begin, end = rows
    row_NI = weight[begin:end].to(torch.float32, copy=True)
    sums = add_tiles(row_NI, pool, tiles, first_site, out_bounds, begin)
    merged[begin:end] = sums


def linear_norm(weight_OI: Tensor) -> float:
    """The root of the sum of the squares of all elements of a packed weight."""
    return float(torch.linalg.vector_norm(weight_OI, dtype=torch.float32))


def update_norm(
    pool: Tensor, tiles: TileTable, first_site: int, out_bounds: tuple[int, ...], in_features: int
) -> float:
    """As `linear_norm`, of what `merge_linear_` adds to a weight of these sizes.

    Cost    O(R * R * (I + O)), without making the update itself: |B A|² = sum of (A Aᵀ) * (Bᵀ B).
    """
    total = 0.0
    with _one_thread():
        for part, (low, high) in enumerate(pairwise(out_bounds)):
            first, last = tiles.ranges[first_site + part, 0].tolist()
            if first < last:
                factors = (
                    _factors(pool, tiles, tile, in_features, high - low)
                    for tile in range(first, last)
                )
                a_RI, bt_RO = (torch.cat(matrices) for matrices in zip(*factors, strict=True))
                total += float(((a_RI @ a_RI.T) * (bt_RO @ bt_RO.T)).sum())
    return math.sqrt(max(total, 0.0))


def update_bound(
    pool: Tensor, tiles: TileTable, first_site: int, out_bounds: tuple[int, ...], in_features: int
) -> float:
    """What `update_norm` is not above: the sum over ranks r of |A_r| |B_r|, by the triangle
    inequality, over all parts.

    Cost    O(R * (I + O)).
    """
    total = 0.0
    with _one_thread():
        for part, (low, high) in enumerate(pairwise(out_bounds)):
            first, last = tiles.ranges[first_site + part, 0].tolist()
            of_part = 0.0
            for tile in range(first, last):
                a_RI, bt_RO = _factors(pool, tiles, tile, in_features, high - low)
                norms = torch.linalg.vector_norm(a_RI, dim=1)
                of_part += float(norms @ torch.linalg.vector_norm(bt_RO, dim=1))
            total += of_part**2
    return math.sqrt(total)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products so small that waking torch's threads, and waiting for the last, takes far longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def add_tiles(
    sum_NI: Tensor,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
    first_row: int,
) -> Tensor:
    """Rows of a weight from `first_row` on, in float32, with the tiles added, in place.

    Raises    ValueError if a tile or a vector is not in the pool; then the rows are undefined.
    """
    end_row, in_features = first_row + sum_NI.shape[0], sum_NI.shape[1]
    for part, (low, high) in enumerate(pairwise(out_bounds)):
        begin, end = max(first_row, low), min(end_row, high)
        if begin >= end:
            continue
        first, last = tiles.ranges[first_site + part, 0].tolist()
        for tile in range(first, last):
            a_RI, bt_RO = _factors(pool, tiles, tile, in_features, high - low)
            bt_RN = bt_RO[:, begin - low : end - low]
            sum_NI[begin - first_row : end - first_row].addmm_(bt_RN.T, a_RI)
    return sum_NI


def check_merge(
    num_rows: int,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
    rows: tuple[int, int],
) -> None:
    """Raise ValueError if the arguments of `merge_linear_` disagree."""
    begin, end = rows
    require(
        0 <= begin <= end <= num_rows
        and begin % MERGE_ROWS == 0
        and (end % MERGE_ROWS == 0 or end == num_rows),
        f"rows are {begin} to {end}; they must be multiples of {MERGE_ROWS} in 0 to {num_rows}",
    )
    require(
        (out_bounds[0], out_bounds[-1]) == (0, num_rows)
        and all(low <= high for low, high in pairwise(out_bounds)),
        f"out_bounds {out_bounds} does not cut {num_rows} rows into parts",
    )
    require(
        tiles.ranges.shape[1] == 1,
        f"tiles has {tiles.ranges.shape[1]} segments; one adapter is merged, which is one segment",
    )
    num_parts, num_sites = len(out_bounds) - 1, len(tiles.max_tiles)
    require(
        num_parts >= 1 and 0 <= first_site <= num_sites - num_parts,
        f"sites {first_site} to {first_site + num_parts - 1} are not in a table of {num_sites}",
    )


def _factors(
    pool: Tensor, tiles: TileTable, tile: int, in_features: int, width: int
) -> tuple[Tensor, Tensor]:
    """A [R, I], and scale * u * Bt * v [R, O], of one tile; float32."""
    ranks = int(tiles.ranks[tile])
    a_at, a_stride = int(tiles.a_offset[tile]), int(tiles.a_stride[tile])
    bt_at, bt_stride = int(tiles.bt_offset[tile]), int(tiles.bt_stride[tile])
    a_RI = pool_rows(pool, a_at, a_stride, (ranks, in_features))
    bt_RO = pool_rows(pool, bt_at, bt_stride, (ranks, width))
    u_R = pool_vector(pool, int(tiles.u_offset[tile]), ranks, absent=1.0)
    v_O = pool_vector(pool, int(tiles.v_offset[tile]), width, absent=1.0)
    return a_RI, float(tiles.scale[tile]) * u_R[:, None] * bt_RO * v_O
