"""A matrix of 4-bit integers in groups along the inputs, in the order of torch's CPU kernel.

Knows no files and no layers. Made by models/quantized/loading, multiplied by QuantizedWeight.
Legend: T tokens, I in features, O out features (padded to blocks), G groups of inputs, B blocks of
64 rows, K inputs of a group, N some of the rows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK_ROWS = 64
GROUP_SIZES = (128, 64, 32)  # the best first; all that torch's kernel takes but 256
MIDDLE = 8
MAX_INT = 15
MAX_TERMS = 3  # 3 times the 8 bits of a bfloat16 are the 24 of a float32


class Int4Matrix:
    """w[o, i] = (ints[o, i] - 8) * scale[i // K, o] + offset[i // K, o], in float32.

        packed [B, I, 32]   byte j of (b, i) = ints[64 b + j, i] | ints[64 b + 32 + j, i] << 4

    Scales and offsets are kept as sums of bfloat16, which is exact and what the kernel takes: one
    product for each term.

    Shapes    ints [O, I] uint8, 0 to 15; scale and offset [G, O] float32, finite. K is 32 or a
              multiple of it.
    """

    row_multiple = BLOCK_ROWS

    def __init__(self, ints_OI: Tensor, scale_GO: Tensor, offset_GO: Tensor) -> None:
        self.size = (ints_OI.shape[0], ints_OI.shape[1])
        group_size = ints_OI.shape[1] // scale_GO.shape[0]
        kernel_size = kernel_group_size(group_size)
        assert kernel_size is not None, group_size
        self._group_size = kernel_size
        repeats = group_size // self._group_size
        tables_GO2 = torch.stack((scale_GO, offset_GO), dim=-1).repeat_interleave(repeats, 0)
        padding = -ints_OI.shape[0] % BLOCK_ROWS
        tables_GO2 = torch.nn.functional.pad(tables_GO2, (0, 0, 0, padding))
        self._terms_GO2 = _bfloat16_terms(tables_GO2)
        self._packed_BIJ = _packed(torch.nn.functional.pad(ints_OI, (0, 0, 0, padding)))

    @property
    def kind(self) -> str:
        """Matrices of one kind take the same time an element."""
        return f"int4 of {len(self._terms_GO2)} terms"

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self._packed_BIJ.nbytes + sum(term.nbytes for term in self._terms_GO2)

    def has_kernel(self, dtype: torch.dtype) -> bool:
        """Whether `multiply` takes activations of this dtype."""
        return dtype == torch.bfloat16 and kernel_reads_our_order()

    def multiply(self, x_TI: Tensor) -> Tensor:
        """x Wᵀ: [T, O] of x's dtype, rounded once a term. x must be contiguous."""
        num_rows, width = self.size
        packed_OH = self._packed_BIJ.view(-1, width // 2)
        products_TO = [
            torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI, packed_OH, self._group_size, term_GO2)
            for term_GO2 in self._terms_GO2
        ]
        total_TO: Tensor = functools.reduce(Tensor.add_, products_TO)
        return total_TO[:, :num_rows].contiguous()

    def dequantize(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows begin : end, rounded once to `dtype`: [N, I], a new tensor.

        `begin` is a multiple of `row_multiple`, `end` is too or is O.
        """
        first, last = begin // BLOCK_ROWS, -(-end // BLOCK_ROWS)
        packed_BJI = self._packed_BIJ[first:last].transpose(1, 2).contiguous()
        ints_B2JI = torch.stack((packed_BJI & MAX_INT, packed_BJI >> 4), dim=1)
        w_NGK = ints_B2JI.float().view(-1, self.size[1] // self._group_size, self._group_size)
        scale_NG, offset_NG = self._table(first * BLOCK_ROWS, last * BLOCK_ROWS).permute(2, 1, 0)
        w_NGK.sub_(MIDDLE).mul_(scale_NG[..., None]).add_(offset_NG[..., None])
        return w_NGK.view(-1, self.size[1])[: end - begin].to(dtype)

    def _table(self, begin: int, end: int) -> Tensor:
        """Scales and offsets of some rows: [G, N, 2] float32, exact."""
        terms = [term_GO2[:, begin:end].float() for term_GO2 in self._terms_GO2]
        total_GN2: Tensor = functools.reduce(Tensor.add_, terms)
        return total_GN2


def quantize_int4(rows_OI: Tensor) -> Int4Matrix:
    """16 steps from the smallest to the largest value of each group; tables exact in bfloat16.

    A row depends on itself alone: parts of a fused matrix are quantized as the whole is.
    Values must be finite, and the width a multiple of 32.
    """
    num_rows, width = rows_OI.shape
    group_size = kernel_group_size(width)
    assert group_size is not None, width
    w_OGK = rows_OI.float().view(num_rows, -1, group_size)
    low_OG, high_OG = w_OGK.aminmax(dim=-1)
    scale_OG = ((high_OG - low_OG) / MAX_INT).bfloat16().float()
    offset_OG = (low_OG + MIDDLE * scale_OG).bfloat16().float()
    steps_OG = torch.where(scale_OG == 0, 1.0, scale_OG)
    ints_OGK = ((w_OGK - offset_OG[..., None]) / steps_OG[..., None]).round_().add_(MIDDLE)
    ints_OI = ints_OGK.clamp_(0, MAX_INT).to(torch.uint8).view(num_rows, width)
    return Int4Matrix(ints_OI, scale_OG.T, offset_OG.T)


def kernel_group_size(width: int) -> int | None:
    """The best group of the kernel's that divides `width`, a row or a larger group; else None."""
    return next((size for size in GROUP_SIZES if width % size == 0), None)


@functools.cache
def kernel_reads_our_order() -> bool:
    """Whether torch packs 4-bit integers on this CPU as we do; the order depends on the CPU."""
    ints_OI = torch.arange(2 * BLOCK_ROWS * 32).view(2 * BLOCK_ROWS, 32).mul(7) % 16
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(ints_OI.int(), 1)
    return torch.equal(theirs.flatten(), _packed(ints_OI.to(torch.uint8)).flatten())


def _packed(ints_OI: Tensor) -> Tensor:
    """[B, I, 32] of [O, I], O a multiple of 64."""
    low_and_high = ints_OI.view(-1, 2, BLOCK_ROWS // 2, ints_OI.shape[1])
    packed_BJI = low_and_high[:, 0] | low_and_high[:, 1] << 4
    return packed_BJI.transpose(1, 2).contiguous()


def _bfloat16_terms(values: Tensor) -> tuple[Tensor, ...]:
    """bfloat16 tensors whose sum, in float32 and in order, is exactly `values`."""
    terms = [values.bfloat16()]
    rest = values - terms[0].float()
    while rest.any() and len(terms) < MAX_TERMS:
        terms.append(rest.bfloat16())
        rest = rest - terms[-1].float()
    assert not rest.any()
    return tuple(term.contiguous() for term in terms)
