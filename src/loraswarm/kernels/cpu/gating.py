"""The gated product of a feed-forward, silu(gate) * up: an item is some columns of some rows.

Called by kernels/cpu/operations and, to record an operation, by kernels/cpu/rowwise.
Legend: T tokens, F intermediate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from loraswarm.kernels.cpu.jit import called, inlined
from loraswarm.kernels.cpu.memory import memory_at, moved
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    divide,
    exp,
    load,
    load_part,
    multiply,
    rounded,
    store,
    store_part,
    subtract,
    zeros,
)

LANES = 32
"""Two registers: one's chain of operations fills the gaps of the other's."""
ITEM_ELEMENTS = 1 << 13
"""A few microseconds of one core, and several items in a small batch."""


def silu_arguments(gate_up_TF2: Tensor, out_TF: Tensor) -> tuple[int, tuple[int, ...]]:
    """The number of items and their arguments."""
    num_tokens, size = out_TF.shape
    num_blocks = -(-size // ITEM_ELEMENTS)
    rows_per_item = max(1, ITEM_ELEMENTS // max(size, 1))
    return num_blocks * -(-num_tokens // rows_per_item), (
        gate_up_TF2.data_ptr(),
        gate_up_TF2.stride(0),
        out_TF.data_ptr(),
        num_tokens,
        size,
        num_blocks,
        rows_per_item,
    )


@called
def silu_multiply_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Some columns of some rows."""
    source, stride = memory_at(like, arguments[0]), arguments[1]
    target, num_tokens, size = memory_at(like, arguments[2]), arguments[3], arguments[4]
    num_blocks, rows_per_item = arguments[5], arguments[6]
    first_column = item % num_blocks * ITEM_ELEMENTS
    num_columns = min(ITEM_ELEMENTS, size - first_column)
    first_row = item // num_blocks * rows_per_item
    for row in range(first_row, min(first_row + rows_per_item, num_tokens)):
        gate = moved(source, row * stride + first_column)
        _silu_multiply(
            gate, moved(gate, size), moved(target, row * size + first_column), num_columns
        )


@called
def _silu_multiply(gate: Any, up: Any, target: Any, size: int) -> None:
    """target = silu(gate) * up, rounded after each."""
    zero = zeros(LANES)
    whole = size // LANES * LANES
    for at in range(0, whole, LANES):
        value = rounded(_silu(load(zero, gate, at)), gate)
        store(multiply(value, load(zero, up, at)), target, at)
    if whole < size:
        left = size - whole
        value = rounded(_silu(load_part(zero, gate, whole, left)), gate)
        store_part(multiply(value, load_part(zero, up, whole, left)), target, whole, left)


@inlined
def _silu(value: Any) -> Any:
    """value / (1 + e ** -value)"""
    negative = subtract(broadcast(value, np.float32(0.0)), value)
    return divide(value, add(broadcast(value, np.float32(1.0)), exp(negative)))
