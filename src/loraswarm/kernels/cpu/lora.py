"""Records the low-rank updates: shrink, shrink beside the base's product, and expand.

Checks what the caller gives against the tile table; an item checks nothing any more. Called through
kernels/cpu.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from loraswarm.kernels import TileTable, reference
from loraswarm.kernels.cpu.elements import ELEMENTS, check_elements
from loraswarm.kernels.cpu.linear import PackedWeight, check_linear, linear_arguments
from loraswarm.kernels.cpu.operations import EXPAND, LINEAR_SHRINK, SHRINK
from loraswarm.kernels.cpu.program import programs
from loraswarm.kernels.cpu.table import TablePlan, Work, last_plan


def lora_shrink(
    x_TI: Tensor, pool: Tensor, tiles: TileTable, first_site: int, num_parts: int
) -> Tensor:
    """See `kernels.reference.lora_shrink`."""
    plan, work = _shrink_work(x_TI, pool, tiles, first_site, num_parts)
    h_QTR = programs.buffer((num_parts, work.num_tokens, work.num_columns), torch.float32)
    if work.num_items > 0:
        num_products = h_QTR.numel() * x_TI.shape[1]
        arguments = _shrink_arguments(x_TI, h_QTR, pool, work)
        programs.add(SHRINK, work.num_items, arguments, x_TI.dtype, num_products)
        _keep(plan)
    return h_QTR


def linear_shrink(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    num_parts: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.linear_shrink`.

    One operation: some threads wait for the matrices of adapters while others multiply.
    """
    check_linear(x_TI, weight, bias_O)
    plan, work = _shrink_work(x_TI, pool, tiles, first_site, num_parts)
    h_QTR = programs.buffer((num_parts, work.num_tokens, work.num_columns), torch.float32)
    y_TO = programs.buffer((work.num_tokens, weight.out_features), x_TI.dtype)
    num_linears, linear = linear_arguments(x_TI, weight, bias_O, y_TO)
    shrink = _shrink_arguments(x_TI, h_QTR, pool, work)
    programs.add(
        LINEAR_SHRINK,
        num_linears + work.num_items,
        (*shrink, num_linears, work.num_items, *linear),
        x_TI.dtype,
        work.num_tokens * weight.panels.numel() + h_QTR.numel() * x_TI.shape[1],
    )
    _keep(plan)
    return y_TO, h_QTR


def lora_expand_(
    y_TO: Tensor,
    h_QTR: Tensor,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
) -> None:
    """See `kernels.reference.lora_expand_`."""
    if not _fits_expand(y_TO, h_QTR, pool, out_bounds):
        reference.check_expand(y_TO, h_QTR, pool, tiles, out_bounds)
        check_elements("y_TO", y_TO)
    if y_TO.numel() == 0:
        return
    plan = last_plan.of(tiles, pool)
    work = plan.expand_work(first_site, out_bounds)
    _check_tokens(work, y_TO)
    if h_QTR.shape[2] < work.num_columns:
        raise ValueError("h_QTR has fewer columns than tiles.ranges needs")
    if work.num_items == 0:
        return
    arguments = (
        y_TO.data_ptr(),
        y_TO.stride(0),
        work.num_tokens,
        h_QTR.data_ptr(),
        h_QTR.shape[2],
        pool.data_ptr(),
        *work.arguments,
    )
    num_products = y_TO.numel() * h_QTR.shape[2]
    programs.add(EXPAND, work.num_items, arguments, y_TO.dtype, num_products)
    _keep(plan)


def _shrink_work(
    x_TI: Tensor, pool: Tensor, tiles: TileTable, first_site: int, num_parts: int
) -> tuple[TablePlan, Work]:
    dtype = x_TI.dtype
    if not (
        x_TI.dim() == 2
        and x_TI.is_contiguous()
        and _is_flat(pool, dtype)
        and dtype in ELEMENTS
        and x_TI.is_cpu
    ):
        reference.check_shrink(x_TI, pool, tiles)
        check_elements("x_TI", x_TI)
    plan = last_plan.of(tiles, pool)
    work = plan.shrink_work(first_site, num_parts, x_TI.shape[1])
    _check_tokens(work, x_TI)
    return plan, work


def _shrink_arguments(x_TI: Tensor, h_QTR: Tensor, pool: Tensor, work: Work) -> tuple[int, ...]:
    return (
        x_TI.data_ptr(),
        x_TI.shape[1],
        work.num_tokens,
        h_QTR.data_ptr(),
        work.num_columns,
        pool.data_ptr(),
        *work.arguments[:4],
    )


def _keep(plan: TablePlan) -> None:
    """Keep alive what the operation just recorded reads of the plan."""
    if programs.is_recording:
        programs.hold(plan)


def _is_flat(pool: Tensor, dtype: torch.dtype) -> bool:
    return pool.dtype == dtype and pool.dim() == 1 and pool.is_contiguous()


def _fits_expand(y_TO: Tensor, h_QTR: Tensor, pool: Tensor, out_bounds: tuple[int, ...]) -> bool:
    """Whether all checks of the tensors find nothing; those of the table are its plan's."""
    return (
        y_TO.dim() == 2
        and y_TO.stride(1) == 1
        and _is_flat(pool, y_TO.dtype)
        and y_TO.dtype in ELEMENTS
        and y_TO.is_cpu
        and h_QTR.dtype == torch.float32
        and h_QTR.dim() == 3
        and h_QTR.is_contiguous()
        and h_QTR.shape[0] == len(out_bounds) - 1
        and h_QTR.shape[1] == y_TO.shape[0]
        and out_bounds[0] == 0
        and out_bounds[-1] == y_TO.shape[1]
        and _ascends(out_bounds)
    )


@cache
def _ascends(bounds: tuple[int, ...]) -> bool:
    return list(bounds) == sorted(bounds)


def _check_tokens(work: Work, rows: Tensor) -> None:
    if rows.shape[0] != work.num_tokens:
        raise ValueError("tiles.segments must go from 0 to the number of tokens")
