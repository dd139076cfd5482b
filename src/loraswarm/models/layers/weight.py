"""The matrix of a linear, in row order or packed into an order that is computed from faster.

Packed once, it is not rearranged in every product. The kernels' own order comes first; where they
have none for a dtype or CPU, oneDNN's does, which torch would otherwise make anew in every call:
1.7 to 2.6 times slower for 1 to 32 rows in bfloat16 on 2 Zen 4 cores, 2 to 4 times in float32.
Values do not change; unpacking returns the same bits.
Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraswarm.kernels import Kernels

X86_MACHINES = ("x86_64", "AMD64")
TYPICAL_ROWS = 16  # a hint; packed once, the order serves every number of rows


class Weight:
    """One matrix [O, I], computed with but never changed after loading."""

    def __init__(self, rows_OI: Tensor) -> None:
        self._rows_OI: Tensor | None = rows_OI
        self._nbytes = rows_OI.nbytes
        self._onednn_OI: Tensor | None = None
        self._panels: Any = None

    @property
    def rows(self) -> Tensor:
        """[O, I] in row order: the tensor itself, or a copy of the same bits once packed."""
        if self._rows_OI is not None:
            return self._rows_OI
        if self._panels is not None:
            unpacked: Tensor = self._panels.unpack()
            return unpacked
        assert self._onednn_OI is not None
        return self._onednn_OI.to_dense()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, without what an order pads."""
        return self._nbytes

    @property
    def is_packed(self) -> bool:
        return self._rows_OI is None

    @property
    def panels(self) -> Any:
        """What `Kernels.linear` takes, once packed so; None: `multiply` is to be used."""
        return self._panels

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias by torch, at once: [T, O] of x's dtype, a new contiguous tensor.

        Not for a weight that has `panels`.
        """
        if self._onednn_OI is None:
            assert self._rows_OI is not None
            return F.linear(x_TI, self._rows_OI, bias_O)
        product_TO: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_TI, self._onednn_OI, bias_O, "none", [], ""
        )
        return product_TO

    def pack_(self, kernels: Kernels | None = None) -> None:
        """Keep a packed order only: that of `kernels`, if they have one for this dtype on this
        machine, else oneDNN's. `can_pack` must hold."""
        if self._rows_OI is None:
            return
        if kernels is not None:
            self._panels = kernels.pack_linear(self._rows_OI)
        if self._panels is None:
            self._onednn_OI = torch.ops.mkldnn._reorder_linear_weight(self._rows_OI, TYPICAL_ROWS)
        self._rows_OI = None


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN computes this dtype from packed weights on this machine."""
    if device.type != "cpu" or platform.machine() not in X86_MACHINES:
        return False
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def multiply(
    kernels: Kernels,
    weight: Weight,
    x_TI: Tensor,
    bias_O: Tensor | None = None,
    is_float32: bool = False,
) -> Tensor:
    """x Wᵀ + bias: [T, O], recorded where the kernels compute it.

    Of x's dtype; float32 with `is_float32`, whose values are rounded to x's dtype all the same.
    """
    if weight.panels is not None:
        return kernels.linear(x_TI, weight.panels, bias_O, is_float32)
    kernels.finish()
    y_TO = weight.multiply(x_TI, bias_O)
    return y_TO.float() if is_float32 else y_TO
