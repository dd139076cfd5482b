"""The weight of a linear whose matrix is kept as integers; stands in for `Weight`.

Few rows are multiplied by torch's kernel from the integers. From so many rows on that dequantizing
costs less, it multiplies by floats, a block of rows at a time, so that no float copy of a matrix is
ever whole. Where the border lies is measured (models/quantized/crossover).
Legend: T tokens, I in features, O out features, N rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraswarm.models.layers.weight import Weight

BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32: stays in the caches of a few cores


class IntegerMatrix(Protocol):
    """What a QuantizedWeight is made of: `Int8Matrix`, `Int4Matrix`."""

    row_multiple: int

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def kind(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def has_kernel(self, dtype: torch.dtype) -> bool: ...
    def multiply(self, x_TI: Tensor) -> Tensor: ...
    def dequantize(self, begin: int, end: int, dtype: torch.dtype) -> Tensor: ...


class QuantizedWeight(Weight):
    """One matrix [O, I] of integers, as `Weight` is one of floats of `dtype`.

    `order_I`, if given, says which input each column of the matrix belongs to. Products of up to
    `max_kernel_rows` rows are the kernel's, if the matrix has one for the dtype.
    """

    def __init__(
        self,
        matrix: IntegerMatrix,
        dtype: torch.dtype,
        max_kernel_rows: int = 0,
        order_I: Tensor | None = None,
    ) -> None:
        self._matrix = matrix
        self._dtype = dtype
        self._order_I = order_I
        self.max_kernel_rows = max_kernel_rows if matrix.has_kernel(dtype) else 0

    @property
    def rows(self) -> Tensor:
        """[O, I]: the floats that are multiplied by, each rounded once to `dtype`; a copy."""
        rows_OI = torch.empty(self._matrix.size, dtype=self._dtype)
        for begin, end, block_NI in self._blocks():
            if self._order_I is None:
                rows_OI[begin:end] = block_NI
            else:
                rows_OI[begin:end, self._order_I] = block_NI
        return rows_OI

    @property
    def is_packed(self) -> bool:
        """Always: the rows were given up when the integers were made."""
        return True

    @property
    def panels(self) -> None:
        """None: `multiply` is to be used."""

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self._matrix.nbytes + (0 if self._order_I is None else self._order_I.nbytes)

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias: [T, O] of x's dtype, a new contiguous tensor."""
        if self._order_I is not None:
            x_TI = x_TI.index_select(1, self._order_I)
        if 0 < x_TI.shape[0] <= self.max_kernel_rows:
            y_TO = self._matrix.multiply(x_TI.contiguous())
            return y_TO if bias_O is None else y_TO.add_(bias_O)
        y_TO = x_TI.new_empty(x_TI.shape[0], self._matrix.size[0])
        for begin, end, block_NI in self._blocks():
            bias_N = None if bias_O is None else bias_O[begin:end]
            y_TO[:, begin:end] = F.linear(x_TI, block_NI, bias_N)
        return y_TO

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """First row, end and values [N, I] of block after block, in the matrix's column order."""
        num_rows, width = self._matrix.size
        multiple = self._matrix.row_multiple
        step = max(1, BLOCK_ELEMENTS // width // multiple) * multiple
        for begin in range(0, num_rows, step):
            end = min(begin + step, num_rows)
            yield begin, end, self._matrix.dequantize(begin, end, self._dtype)
