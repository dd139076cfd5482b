"""Records products with packed weights. Called through kernels/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.kernels.cpu.linear import PackedWeight, check_linear, linear_arguments
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
