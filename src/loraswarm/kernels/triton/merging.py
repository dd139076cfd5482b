"""Merging an adapter into a weight on a CUDA device: torch's products, no kernel of our own.

Bound by reading the weight and writing it; in float32, which torch must not shorten to TF32. Called
through kernels/triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.kernels import TileTable, reference_merging
from loraswarm.kernels.triton.linear import RowWeight


def empty_linear(weight: RowWeight) -> RowWeight:
    """See `kernels.reference.empty_linear`."""
    return RowWeight(torch.empty_like(weight.weight_OI))


def linear_norm(weight: RowWeight) -> float:
    """See `kernels.reference.linear_norm`; waits for the device."""
    return reference_merging.linear_norm(weight.weight_OI)


def merge_linear_(
    merged: RowWeight,
    weight: RowWeight,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
    rows: tuple[int, int],
) -> None:
    """See `kernels.reference.merge_linear_`."""
    merged_OI, weight_OI = merged.weight_OI, weight.weight_OI
    reference_merging.merge_linear_(merged_OI, weight_OI, pool, tiles, first_site, out_bounds, rows)
