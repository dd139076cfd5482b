"""Products with the base's weights, by torch, and the shrink beside them on a stream of its own.

A weight stays in row order. What is recorded elsewhere is launched at once here: the device works
through it while the host goes on. Called through kernels/triton.
Legend: T tokens, I in features, O out features, Q parts, R rank columns.
"""

from __future__ import annotations

from functools import cache
from threading import get_ident

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraswarm.kernels import TileTable
from loraswarm.kernels.arguments import require
from loraswarm.kernels.triton.launch import check_device
from loraswarm.kernels.triton.lora import lora_shrink


class RowWeight:
    """A weight [O, I] in row order, computed with but never changed."""

    __slots__ = ("weight_OI",)

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI

    def unpack(self) -> Tensor:
        """[O, I] in row order: the tensor itself."""
        return self.weight_OI

    def look_up(self, row_T: Tensor) -> Tensor:
        """[T, I]: the rows with these numbers, int64 below O; a new tensor."""
        return F.embedding(row_T, self.weight_OI)


def pack_linear(weight_OI: Tensor) -> RowWeight:
    """See `kernels.reference.pack_linear`; keeps the tensor itself."""
    return RowWeight(weight_OI)


def linear(
    x_TI: Tensor, weight: RowWeight, bias_O: Tensor | None, is_float32: bool = False
) -> Tensor:
    """See `kernels.reference.linear`."""
    weight_OI = weight.weight_OI
    require(
        x_TI.dim() == 2 and x_TI.shape[1] == weight_OI.shape[1],
        f"x_TI is {tuple(x_TI.shape)}; it must be [T, {weight_OI.shape[1]}]",
    )
    require(x_TI.dtype == weight_OI.dtype, f"x_TI is {x_TI.dtype}, the weight is {weight_OI.dtype}")
    check_device(x_TI=x_TI, weight=weight_OI, bias_O=bias_O)
    y_TO = F.linear(x_TI, weight_OI, bias_O)
    return y_TO.float() if is_float32 else y_TO


def linear_shrink(
    x_TI: Tensor,
    weight: RowWeight,
    bias_O: Tensor | None,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    num_parts: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.linear_shrink`.

    Both read x only. The shrink, which waits for the bytes of adapters, runs beside the product.
    """
    if not x_TI.is_cuda:
        y_TO = linear(x_TI, weight, bias_O)
        return y_TO, lora_shrink(x_TI, pool, tiles, first_site, num_parts)
    side, main = _side_stream(x_TI.device, get_ident()), torch.cuda.current_stream(x_TI.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        h_QTR = lora_shrink(x_TI, pool, tiles, first_site, num_parts)
    y_TO = linear(x_TI, weight, bias_O)
    # h is of the side stream's memory, which is handed out again on that stream only, and what runs
    # there next has waited for all that reads h here.
    main.wait_stream(side)
    return y_TO, h_QTR


@cache
def _side_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """The stream of all shrinks of a thread: their kernels and scratch memory follow each other on
    it. What one thread captures, another must not add to."""
    return torch.cuda.Stream(device)
