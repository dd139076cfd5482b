"""A matrix of 8-bit integers, scaled by output channel or by groups along the inputs.

Knows no files and no layers. Made by models/quantized/loading, multiplied by QuantizedWeight.
Legend: T tokens, I in features, O out features, G groups of inputs, N some of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_INT = 127
KERNEL_MULTIPLE = 16  # torch's kernel reads past the end of narrower rows


class Int8Matrix:
    """w[o, i] = ints[o, i] * scale[o, i // (I / G)] + offset[o, i // (I / G)], in float32.

    Shapes    ints [O, I] int8; scale and offset [O, G] float32; no offset is one of zeros.
    torch's kernel multiplies bfloat16 by one scale a row, itself exact in bfloat16; any other
    matrix is dequantized for every product.
    """

    row_multiple = 1

    def __init__(self, ints_OI: Tensor, scale_OG: Tensor, offset_OG: Tensor | None = None) -> None:
        self._ints_OI = ints_OI.contiguous()
        self._scale_OG = scale_OG.contiguous()
        self._offset_OG = None if offset_OG is None else offset_OG.contiguous()
        self._kernel_scale_O = scale_OG[:, 0].bfloat16().contiguous()
        self._has_kernel = (
            scale_OG.shape[1] == 1
            and offset_OG is None
            and ints_OI.shape[1] % KERNEL_MULTIPLE == 0
            and torch.equal(self._kernel_scale_O.float(), scale_OG[:, 0])
        )

    @property
    def size(self) -> tuple[int, int]:
        """(O, I)."""
        num_rows, width = self._ints_OI.shape
        return num_rows, width

    @property
    def kind(self) -> str:
        """Matrices of one kind take the same time an element."""
        return "int8" if self._offset_OG is None else "int8 with offsets"

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        kept = (self._ints_OI, self._scale_OG, self._kernel_scale_O, self._offset_OG)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def has_kernel(self, dtype: torch.dtype) -> bool:
        """Whether `multiply` takes activations of this dtype."""
        return self._has_kernel and dtype == torch.bfloat16

    def multiply(self, x_TI: Tensor) -> Tensor:
        """x Wᵀ: [T, O] of x's dtype, summed in float32 and rounded once. x must be contiguous."""
        product_TO: Tensor = torch.ops.aten._weight_int8pack_mm(
            x_TI, self._ints_OI, self._kernel_scale_O
        )
        return product_TO

    def dequantize(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows begin : end, rounded once to `dtype`: [N, I], a new tensor."""
        ints_NI = self._ints_OI[begin:end]
        if self.has_kernel(dtype):  # a product of two bfloat16 is rounded once as well
            return ints_NI.to(dtype).mul_(self._kernel_scale_O[begin:end, None])
        num_rows, num_groups = end - begin, self._scale_OG.shape[1]
        w_NGK = ints_NI.float().view(num_rows, num_groups, -1)
        w_NGK.mul_(self._scale_OG[begin:end, :, None])
        if self._offset_OG is not None:
            w_NGK.add_(self._offset_OG[begin:end, :, None])
        return w_NGK.view(num_rows, -1).to(dtype)


def quantize_int8(rows_OI: Tensor) -> Int8Matrix:
    """The nearest 8-bit integers, symmetric, one scale a row; scales are exact in bfloat16.

    A row depends on itself alone: parts of a fused matrix are quantized as the whole is.
    Values must be finite.
    """
    rows_OI = rows_OI.float()
    scale_O1 = (rows_OI.abs().amax(1, keepdim=True) / MAX_INT).bfloat16().float()
    scale_O1[scale_O1 == 0] = 1.0
    ints_OI = (rows_OI / scale_O1).round_().clamp_(-MAX_INT, MAX_INT).to(torch.int8)
    return Int8Matrix(ints_OI, scale_O1)
