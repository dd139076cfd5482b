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

from loraswarm.kernels import Kernels, reference

X86_MACHINES = ("x86_64", "AMD64")
TYPICAL_ROWS = 16  # a hint; packed once, the order serves every number of rows


class Weight:
    """One matrix [O, I], computed with but never changed once it has its values."""

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
    def can_be_merged(self) -> bool:
        """Whether `blank` gives a weight that an adapter can be merged into: integers cannot hold
        the sum."""
        return type(self) is Weight

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

    def blank(self, kernels: Kernels) -> Weight:
        """A weight of this size with no values yet, in the same order; where that is oneDNN's, in
        row order, to be packed when it is whole. `can_be_merged` must hold."""
        assert self.can_be_merged
        if self._panels is None:
            size = self._onednn_OI if self._rows_OI is None else self._rows_OI
            assert size is not None
            device = size.device
            return Weight(torch.empty(size.shape, dtype=size.dtype, device=device))
        blank = Weight.__new__(Weight)
        blank._rows_OI = blank._onednn_OI = None
        blank._nbytes = self._nbytes
        blank._panels = kernels.empty_linear(self._panels)
        return blank

    def norm(self, kernels: Kernels) -> float:
        """The root of the sum of the squares of all elements."""
        own = kernels if self._panels is not None else reference
        return own.linear_norm(self.rows if self._panels is None else self._panels)

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
