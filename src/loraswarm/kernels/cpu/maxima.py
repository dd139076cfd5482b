"""The largest element of each block of a row of logits: an item is some blocks of one row.

Called by kernels/cpu/operations and, to record an operation, through kernels/cpu.
Legend: Z rows, V vocabulary, N blocks of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraswarm.kernels.arguments import check_rows_of_floats
from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import float_at, moved
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    highest,
    load,
    maximum,
    total,
    where_between,
    zeros,
)

LANES = 32
ITEM_ELEMENTS = 1 << 14
"""Some microseconds of one core."""
MAXIMA_ELEMENTS = 4
"""Elements that take as long as one multiply-add of a kernel, about."""
LOWEST, ONE, NAN = np.float32(-np.inf), np.float32(1.0), np.float32(np.nan)


def maxima_arguments(rows_ZV: Tensor, maxima_ZN: Tensor, size: int) -> tuple[int, tuple[int, ...]]:
    """The number of items and their arguments."""
    num_rows, num_blocks = maxima_ZN.shape
    blocks_per_item = max(1, ITEM_ELEMENTS // size)
    items_per_row = -(-num_blocks // blocks_per_item)
    return num_rows * items_per_row, (
        rows_ZV.data_ptr(),
        rows_ZV.stride(0),
        rows_ZV.shape[1],
        maxima_ZN.data_ptr(),
        num_blocks,
        size,
        blocks_per_item,
        items_per_row,
    )


def new_maxima(rows_ZV: Tensor, size: int) -> Tensor:
    """Memory for the result, [Z, N] float32. Raises ValueError if the rows are not floats."""
    check_rows_of_floats(rows_ZV, size)
    return torch.empty(rows_ZV.shape[0], -(-rows_ZV.shape[1] // size), dtype=torch.float32)


@called
def maxima_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Some blocks of one row."""
    num_columns, num_blocks, size = arguments[2], arguments[4], arguments[5]
    blocks_per_item, items_per_row = arguments[6], arguments[7]
    row, first = item // items_per_row, item % items_per_row * blocks_per_item
    source = moved(float_at(arguments[0]), row * arguments[1])
    target = moved(float_at(arguments[3]), row * num_blocks)
    for block in range(first, min(first + blocks_per_item, num_blocks)):
        begin = block * size
        target[block] = _maximum(moved(source, begin), min(size, num_columns - begin))


@called
def _maximum(source: Any, count: int) -> Any:
    """The largest of `count` elements, NaN if one of them is."""
    zero = zeros(LANES)
    best, one = broadcast(zero, LOWEST), broadcast(zero, ONE)
    ordered, whole = zero, count // LANES * LANES
    for at in range(0, whole, LANES):
        value = load(zero, source, at)
        best = maximum(best, value)
        ordered = add(ordered, where_between(value, value, value, one, zero))
    result = highest(best)
    if total(ordered) != whole:
        result = NAN
    for at in range(whole, count):
        if source[at] > result or source[at] != source[at]:
            result = source[at]
        if result != result:
            return NAN
    return result
