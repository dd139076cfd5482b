"""Records products with packed weights. Called through kernels/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.kernels import TileTable
from loraswarm.kernels.cpu import lora
from loraswarm.kernels.cpu.linear import PackedWeight, linear_arguments
from loraswarm.kernels.cpu.operations import LINEAR
from loraswarm.kernels.cpu.program import programs


def linear(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, is_float32: bool = False
) -> Tensor:
    """See `kernels.reference.linear`."""
    check_linear(x_TI, weight, bias_O)
    dtype = torch.float32 if is_float32 else x_TI.dtype
    y_TO = programs.buffer((x_TI.shape[0], weight.out_features), dtype)
    num_items, arguments = linear_arguments(x_TI, weight, bias_O, y_TO)
    num_products = x_TI.shape[0] * weight.panels.numel()
    programs.add(LINEAR, num_items, arguments, x_TI.dtype, num_products)
    return y_TO


def linear_shrink(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    num_parts: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.linear_shrink`."""
    check_linear(x_TI, weight, bias_O)
    y_TO = programs.buffer((x_TI.shape[0], weight.out_features), x_TI.dtype)
    h_QTR = lora.linear_shrink(x_TI, weight, bias_O, y_TO, pool, tiles, first_site, num_parts)
    return y_TO, h_QTR


def check_linear(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None) -> None:
    """Raise ValueError if the arguments of `linear` disagree."""
    if x_TI.dim() != 2 or x_TI.shape[1] != weight.in_features or x_TI.stride(1) != 1:
        raise ValueError(
            f"x_TI is {tuple(x_TI.shape)}; it must be [T, {weight.in_features}] with contiguous"
            " rows"
        )
    if x_TI.dtype != weight.panels.dtype:
        raise ValueError(f"x_TI is {x_TI.dtype}, the weight is {weight.panels.dtype}")
    if bias_O is not None and (bias_O.numel() != weight.out_features or bias_O.dtype != x_TI.dtype):
        raise ValueError(
            f"bias_O is {bias_O.dtype} of {bias_O.numel()}; it must be {x_TI.dtype} of"
            f" {weight.out_features}"
        )
