"""The low-rank updates on the device: checks what the caller gives, then launches.

No check reads what lies on the device; what tables say is checked by their plans, on the host.
Called through kernels/triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, TileTable
from loraswarm.kernels.reference import check_expand, check_shrink, check_sites
from loraswarm.kernels.triton.expand import launch_expand
from loraswarm.kernels.triton.launch import check_device
from loraswarm.kernels.triton.plan import DevicePlan, plans
from loraswarm.kernels.triton.rows import check_elements
from loraswarm.kernels.triton.shrink import launch_shrink


def lora_shrink(
    x_TI: Tensor, pool: Tensor, tiles: TileTable, first_site: int, num_parts: int
) -> Tensor:
    """See `kernels.reference.lora_shrink`; `tiles` must not be written afterwards.

    Rows of x beyond the last segment belong to none: their rows of h are undefined.

    Numerics  The bits of a token's row depend on the width and on whether the table's longest
              segment is cut as decode or as prefill, else on nothing in the batch.
    """
    check_shrink(x_TI, pool, tiles)
    check_sites(tiles, first_site, num_parts)
    check_elements("x_TI", x_TI)
    check_device(x_TI=x_TI, pool=pool)
    plan = plans.of(tiles, x_TI.device)
    _check_tokens("x_TI", x_TI, plan)
    num_tokens, in_features = x_TI.shape
    num_columns = MAX_TILE_RANKS * tiles.part_tiles(first_site, num_parts)
    num_items = plan.shrink_items(first_site, num_parts, in_features, num_columns, pool)
    shape = num_parts, num_tokens, num_columns
    h_QTR = torch.empty(shape, dtype=torch.float32, device=x_TI.device)
    if h_QTR.numel() > 0 and num_items != 0:
        launch_shrink(x_TI, h_QTR, pool, plan, first_site, num_items)
    return h_QTR


def lora_expand_(
    y_TO: Tensor,
    h_QTR: Tensor,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
) -> None:
    """See `kernels.reference.lora_expand_`; `tiles` must not be written afterwards.

    Rows of y beyond the last segment belong to none and keep their bits.

    Numerics  As of `lora_shrink`; a table with a v adds the tiles of a segment one by one, others
              add their products together. Products with h have at least the accuracy of three
              products of tf32.
    """
    check_expand(y_TO, h_QTR, pool, tiles, out_bounds)
    check_sites(tiles, first_site, len(out_bounds) - 1)
    check_elements("y_TO", y_TO)
    check_device(y_TO=y_TO, h_QTR=h_QTR, pool=pool)
    plan = plans.of(tiles, y_TO.device)
    _check_tokens("y_TO", y_TO, plan)
    num_items = plan.expand_items(first_site, out_bounds, h_QTR.shape[2], pool)
    if y_TO.numel() > 0 and num_items != 0:
        launch_expand(y_TO, h_QTR, pool, plan, first_site, out_bounds, num_items)


def _check_tokens(name: str, rows: Tensor, plan: DevicePlan) -> None:
    num_tokens = plan.table.num_tokens
    if rows.shape[0] < num_tokens:
        raise ValueError(
            f"{name} has {rows.shape[0]} rows; tiles.segments must go from 0 to at most that, "
            f"not to {num_tokens}"
        )
