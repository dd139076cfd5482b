"""Records what is computed by rows: norms, gated products, maxima. Called through kernels/cpu."""

from __future__ import annotations

from torch import Tensor

from loraswarm.kernels import arguments
from loraswarm.kernels.cpu.elements import check_elements
from loraswarm.kernels.cpu.gating import silu_arguments
from loraswarm.kernels.cpu.maxima import MAXIMA_ELEMENTS, maxima_arguments, new_maxima
from loraswarm.kernels.cpu.norm import norm_arguments
from loraswarm.kernels.cpu.operations import ADD_NORM, MAXIMA, SILU_MULTIPLY
from loraswarm.kernels.cpu.program import programs

NORM_PRODUCTS = 8
SILU_PRODUCTS = 16
"""Multiply-adds that take as long as one element."""


def add_rms_norm_(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor | None,
    eps: float,
    rows_Z: Tensor | None = None,
) -> Tensor:
    """See `kernels.reference.add_rms_norm_`."""
    arguments.check_add_rms_norm(x_TD, delta_TD, weight_D, rows_Z)
    check_elements("x_TD", x_TD)
    num_rows, size = x_TD.shape
    if rows_Z is not None:
        num_rows = rows_Z.shape[0]
        programs.hold(rows_Z)
    dtype = x_TD.dtype
    out_ZD = programs.buffer((num_rows, size), dtype)
    num_items, words = norm_arguments(x_TD, delta_TD, weight_D, eps, rows_Z, out_ZD)
    programs.add(ADD_NORM, num_items, words, dtype, NORM_PRODUCTS * num_rows * size)
    return out_ZD


def silu_multiply(gate_up_TF2: Tensor) -> Tensor:
    """See `kernels.reference.silu_multiply`."""
    arguments.check_silu_multiply(gate_up_TF2)
    check_elements("gate_up_TF2", gate_up_TF2)
    num_tokens, width = gate_up_TF2.shape
    dtype = gate_up_TF2.dtype
    out_TF = programs.buffer((num_tokens, width // 2), dtype)
    num_items, words = silu_arguments(gate_up_TF2, out_TF)
    programs.add(SILU_MULTIPLY, num_items, words, dtype, SILU_PRODUCTS * num_tokens * width)
    return out_TF


def block_maxima(rows_ZV: Tensor, size: int) -> Tensor:
    """The largest of each `size` elements of a row, the last block of what is left; NaN where one
    is NaN. By the threads that computed last, which have not gone to sleep yet.

    Shapes    rows [Z, V] float32, rows may lie apart; returns [Z, N] float32.
    Raises    ValueError naming rows_ZV or size.
    """
    maxima_ZN = new_maxima(rows_ZV, size)
    if maxima_ZN.numel() > 0:
        programs.hold(rows_ZV, maxima_ZN)
        num_items, words = maxima_arguments(rows_ZV, maxima_ZN, size)
        num_products = rows_ZV.numel() // MAXIMA_ELEMENTS
        programs.add(MAXIMA, num_items, words, programs.last_dtype, num_products)
    return maxima_ZN
