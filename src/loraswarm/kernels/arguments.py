"""Checks of what kernels are given, the same for every backend: a wrong argument is named.

Called by kernels/reference and by what records operations in kernels/cpu.
Legend: see kernels/__init__; D the normalised width, F intermediate, Z rows of a result.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from loraswarm.kernels import HeadNorms


def require(holds: bool, message: str) -> None:
    """Raise ValueError unless it holds."""
    if not holds:
        raise ValueError(message)


def check_add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor | None, rows_Z: Tensor | None
) -> None:
    """Raise ValueError if the arguments of `add_rms_norm_` disagree."""
    shape, dtype = x_TD.shape, x_TD.dtype
    require(len(shape) == 2 and x_TD.stride(1) == 1, "x_TD must be [T, D] with contiguous rows")
    if delta_TD is not None:
        require(
            delta_TD.shape == shape and delta_TD.stride(1) == 1 and delta_TD.dtype == dtype,
            "delta_TD must have x_TD's shape and dtype, and contiguous rows",
        )
    if weight_D is not None:
        require(
            weight_D.shape == shape[1:] and weight_D.dtype == dtype and weight_D.is_contiguous(),
            "weight_D must be contiguous, [D] of x_TD's dtype",
        )
    if rows_Z is not None:
        check_row_numbers(rows_Z)
        _check_rows(rows_Z, shape[0])


def check_silu_multiply(gate_up_TF2: Tensor) -> None:
    """Raise ValueError if the argument of `silu_multiply` is not as it must be."""
    require(
        gate_up_TF2.dim() == 2 and gate_up_TF2.stride(1) == 1 and gate_up_TF2.shape[1] % 2 == 0,
        "gate_up_TF2 must be [T, 2 F] with contiguous rows",
    )


def check_rows_of_floats(rows_ZV: Tensor, size: int) -> None:
    """Raise ValueError if the arguments of `block_maxima` are not as they must be."""
    require(
        rows_ZV.dim() == 2 and rows_ZV.stride(1) == 1 and rows_ZV.dtype == torch.float32,
        "rows_ZV must be float32, [Z, V] with contiguous rows",
    )
    require(size >= 1, f"size is {size}; a block has at least one element")


def check_row_numbers(rows_Z: Tensor) -> None:
    """Raise ValueError unless it may hold numbers of rows; does not look at them."""
    require(
        rows_Z.dim() == 1 and rows_Z.dtype == torch.int64 and rows_Z.is_contiguous(),
        "rows_Z must be a contiguous [Z] tensor of int64",
    )


def _check_rows(rows_Z: Tensor, num_tokens: int) -> None:
    rows = rows_Z.tolist()
    require(
        all(low < high for low, high in pairwise([-1, *rows, num_tokens])),
        f"rows_Z must ascend, from 0 or more to less than {num_tokens}",
    )


def check_rotate(
    qkv_TNE: Tensor,
    num_heads: int,
    rotation: tuple[Tensor, Tensor],
    pages: Tensor,
    slots_T: Tensor,
    norms: HeadNorms | None,
) -> None:
    """Raise ValueError if the arguments of `rotate_and_write_kv_` disagree."""
    require(pages.dim() == 6, "pages must be [P, layers, 2, K, C, E]")
    require(
        qkv_TNE.dim() == 3 and qkv_TNE.is_contiguous(), "qkv_TNE must be a contiguous [T, N, E]"
    )
    num_tokens, num_all_heads, size = qkv_TNE.shape
    require(num_all_heads == num_heads + 2 * pages.shape[3], "qkv_TNE must have H + 2 K heads")
    require(size == pages.shape[5] and size % 2 == 0, "qkv_TNE must have pages' head size, even")
    require(qkv_TNE.dtype == pages.dtype, f"qkv_TNE is {qkv_TNE.dtype}, pages are {pages.dtype}")
    for name, turn_T1E in zip(("cos_T1E", "sin_T1E"), rotation, strict=True):
        require(
            turn_T1E.shape == (num_tokens, 1, size)
            and turn_T1E.is_contiguous()
            and turn_T1E.dtype == qkv_TNE.dtype,
            f"{name} must be contiguous, [T, 1, E] of qkv_TNE's dtype",
        )
    require(slots_T.shape == (num_tokens,), "slots_T must have one slot per token")
    require(slots_T.dtype == torch.int64, f"slots_T is {slots_T.dtype}; it must be int64")
    if norms is not None:
        check_head_norms(norms, size, qkv_TNE.dtype)


def check_head_norms(norms: HeadNorms, size: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless both weights are contiguous, [E] of that dtype."""
    for name in ("q_weight_E", "k_weight_E"):
        weight_E: Tensor = getattr(norms, name)
        require(
            weight_E.shape == (size,) and weight_E.is_contiguous() and weight_E.dtype == dtype,
            f"norms.{name} must be contiguous, [E] of qkv_TNE's dtype",
        )
