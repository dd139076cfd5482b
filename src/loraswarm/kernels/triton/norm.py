"""Adds to rows and scales them to a mean square of 1: a program is a row, or a few short ones.

Called through kernels/triton; `inverse_rms` by kernels/triton/rotating.
Legend: T tokens, D the normalised width, Z rows of the result, R rows and B columns of a program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels.arguments import check_add_rms_norm, check_row_numbers
from loraswarm.kernels.triton.launch import ceil_power, check_device, on_device
from loraswarm.kernels.triton.rows import check_elements

MAX_COLUMNS = 1 << 14
"""A longer row does not fit the registers of a program and is read twice."""
LONG_COLUMNS = 1 << 12
MIN_ELEMENTS = 1 << 10
MAX_ROWS = 16
WARP_ELEMENTS = 512
MAX_WARPS = 16


class Part(NamedTuple):
    """What a program holds at a time: rows and columns, powers of two, and the warps it needs."""

    num_rows: int
    num_columns: int
    num_warps: int


def part_of(size: int) -> Part:
    """For rows of `size` elements, whatever their number: a row's bits do not depend on others."""
    num_columns = ceil_power(size) if size <= MAX_COLUMNS else LONG_COLUMNS
    num_rows = min(MAX_ROWS, max(1, MIN_ELEMENTS // num_columns))
    num_warps = min(MAX_WARPS, max(1, num_rows * num_columns // WARP_ELEMENTS))
    return Part(num_rows, num_columns, num_warps)


def add_rms_norm_(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor | None,
    eps: float,
    rows_Z: Tensor | None = None,
) -> Tensor:
    """See `kernels.reference.add_rms_norm_`.

    The values of `rows_Z` are not looked at: that they ascend and exist is up to the caller.
    """
    check_add_rms_norm(x_TD, delta_TD, weight_D, None)
    check_elements("x_TD", x_TD)
    if rows_Z is not None:
        check_row_numbers(rows_Z)
    check_device(x_TD=x_TD, delta_TD=delta_TD, weight_D=weight_D, rows_Z=rows_Z)
    num_rows = x_TD.shape[0] if rows_Z is None else rows_Z.shape[0]
    out_ZD = torch.empty(num_rows, x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device)
    if out_ZD.numel() == 0:
        return out_ZD
    size = x_TD.shape[1]
    part = part_of(size)
    kernel = _add_norm_kernel if size <= part.num_columns else _add_norm_long_kernel
    with on_device(x_TD):
        kernel[(-(-num_rows // part.num_rows),)](
            x_TD,
            delta_TD,
            weight_D,
            rows_Z,
            out_ZD,
            x_TD.stride(0),
            delta_TD.stride(0) if delta_TD is not None else 0,
            num_rows,
            eps,
            SIZE=size,
            ROWS=part.num_rows,
            COLUMNS=part.num_columns,
            num_warps=part.num_warps,
        )
    return out_ZD


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows"])
def _add_norm_kernel(
    x,
    delta,
    weight,
    rows,
    out,
    x_stride,
    delta_stride,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some rows of the result, each whole; absent tensors are None."""
    index_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = index_R < num_rows
    row_R = _rows(rows, index_R, is_row_R)
    x_at_R1, delta_at_R1 = (row_R * x_stride)[:, None], (row_R * delta_stride)[:, None]
    column_1B = tl.arange(0, COLUMNS)[None, :]
    is_inside_RB = is_row_R[:, None] & (column_1B < SIZE)
    if weight is not None:
        weight_1B = tl.load(weight + column_1B, mask=column_1B < SIZE, other=0.0)
    sum_RB = _sums(x, delta, x_at_R1, delta_at_R1, column_1B, is_inside_RB)
    value_RB = sum_RB.to(tl.float32)
    inverse_R1 = inverse_rms(tl.sum(value_RB * value_RB, axis=1), eps, SIZE)[:, None]
    if delta is not None:
        # A thread of another warp may hold a copy of an element, and must have read it.
        tl.debug_barrier()
        tl.store(x + x_at_R1 + column_1B, sum_RB, mask=is_inside_RB)
    out_RB = (value_RB * inverse_R1).to(sum_RB.dtype)
    if weight is not None:
        out_RB = (out_RB.to(tl.float32) * weight_1B.to(tl.float32)).to(sum_RB.dtype)
    out_at_R1 = (index_R.to(tl.int64) * SIZE)[:, None]
    tl.store(out + out_at_R1 + column_1B, out_RB, mask=is_inside_RB)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows"])
def _add_norm_long_kernel(
    x,
    delta,
    weight,
    rows,
    out,
    x_stride,
    delta_stride,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """As `_add_norm_kernel`, some columns at a time; x is written in the second pass only."""
    index_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = index_R < num_rows
    row_R = _rows(rows, index_R, is_row_R)
    x_at_R1, delta_at_R1 = (row_R * x_stride)[:, None], (row_R * delta_stride)[:, None]
    out_at_R1 = (index_R.to(tl.int64) * SIZE)[:, None]
    squares_RB = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, SIZE, COLUMNS):
        column_1B = first + tl.arange(0, COLUMNS)[None, :]
        is_inside_RB = is_row_R[:, None] & (column_1B < SIZE)
        sum_RB = _sums(x, delta, x_at_R1, delta_at_R1, column_1B, is_inside_RB)
        value_RB = sum_RB.to(tl.float32)
        squares_RB += value_RB * value_RB
    inverse_R1 = inverse_rms(tl.sum(squares_RB, axis=1), eps, SIZE)[:, None]
    for first in range(0, SIZE, COLUMNS):
        column_1B = first + tl.arange(0, COLUMNS)[None, :]
        is_inside_RB = is_row_R[:, None] & (column_1B < SIZE)
        sum_RB = _sums(x, delta, x_at_R1, delta_at_R1, column_1B, is_inside_RB)
        if delta is not None:
            # A thread of another warp may hold a copy of an element, and must have read it.
            tl.debug_barrier()
            tl.store(x + x_at_R1 + column_1B, sum_RB, mask=is_inside_RB)
        out_RB = (sum_RB.to(tl.float32) * inverse_R1).to(sum_RB.dtype)
        if weight is not None:
            weight_1B = tl.load(weight + column_1B, mask=column_1B < SIZE, other=0.0)
            out_RB = (out_RB.to(tl.float32) * weight_1B.to(tl.float32)).to(sum_RB.dtype)
        tl.store(out + out_at_R1 + column_1B, out_RB, mask=is_inside_RB)


@triton.jit
def inverse_rms(squares_R, eps, SIZE: tl.constexpr):
    """1 / sqrt(squares / SIZE + eps), every operation rounded to nearest."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares_R, SIZE) + eps))


@triton.jit
def _rows(rows, index_R, is_row_R):
    """Which rows of x the rows of the result are, int64."""
    if rows is not None:
        row_R = tl.load(rows + index_R, mask=is_row_R, other=0)
    else:
        row_R = index_R.to(tl.int64)
    return row_R


@triton.jit
def _sums(x, delta, x_at_R1, delta_at_R1, column_1B, is_inside_RB):
    """x + delta, rounded to their dtype; without delta x."""
    sum_RB = tl.load(x + x_at_R1 + column_1B, mask=is_inside_RB, other=0.0)
    if delta is not None:
        delta_RB = tl.load(delta + delta_at_R1 + column_1B, mask=is_inside_RB, other=0.0)
        sum_RB = (sum_RB.to(tl.float32) + delta_RB.to(tl.float32)).to(sum_RB.dtype)
    return sum_RB
