"""Adds to rows and scales them to a mean square of 1: an item of the operation is some rows.

Called by kernels/cpu/operations and, to record an operation, by kernels/cpu/rowwise.
Legend: T tokens, D the normalised width, Z rows of the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from loraswarm.kernels.cpu.elements import float_bits
from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import int64_at, memory_at, moved
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    float_of_bits,
    load,
    load_part,
    multiply,
    multiply_add,
    rounded,
    store,
    store_part,
    total,
    zeros,
)

LANES = 16
ITEM_ELEMENTS = 1 << 13
"""A few microseconds of one core, and several items in a small batch."""


def norm_arguments(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor | None,
    eps: float,
    rows_Z: Tensor | None,
    out_ZD: Tensor,
) -> tuple[int, tuple[int, ...]]:
    """The number of items and their arguments; all tensors have x's dtype but `rows_Z`, int64."""
    num_rows, size = out_ZD.shape
    rows_per_item = max(1, ITEM_ELEMENTS // max(size, 1))
    return -(-num_rows // rows_per_item), (
        x_TD.data_ptr(),
        x_TD.stride(0),
        delta_TD.data_ptr() if delta_TD is not None else 0,
        delta_TD.stride(0) if delta_TD is not None else 0,
        weight_D.data_ptr() if weight_D is not None else 0,
        rows_Z.data_ptr() if rows_Z is not None else 0,
        out_ZD.data_ptr(),
        num_rows,
        size,
        float_bits(eps),
        rows_per_item,
    )


@called
def add_norm_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Some rows of the result."""
    x, x_stride = memory_at(like, arguments[0]), arguments[1]
    delta, delta_stride = memory_at(like, arguments[2]), arguments[3]
    rows, out = int64_at(arguments[5]), memory_at(like, arguments[6])
    num_rows, size, eps = arguments[7], arguments[8], float_of_bits(arguments[9])
    first = item * arguments[10]
    for index in range(first, min(first + arguments[10], num_rows)):
        row = index
        if arguments[5] != 0:
            row = rows[index]
        x_row = moved(x, row * x_stride)
        if arguments[2] != 0:
            squares = _add_row(x_row, moved(delta, row * delta_stride), size)
        else:
            squares = _square_row(x_row, size)
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + eps)
        target = moved(out, index * size)
        if arguments[4] != 0:
            _scale_row(x_row, scale, memory_at(like, arguments[4]), target, size)
        else:
            _normalize_row(x_row, scale, target, size)


@called
def _add_row(x: Any, delta: Any, size: int) -> Any:
    """Add delta to x in place; returns the sum of the squares of what is stored."""
    zero = zeros(LANES)
    squares = zero
    whole = size // LANES * LANES
    for at in range(0, whole, LANES):
        value = add(load(zero, x, at), load(zero, delta, at))
        store(value, x, at)
        value = rounded(value, x)
        squares = multiply_add(value, value, squares)
    if whole < size:
        left = size - whole
        value = add(load_part(zero, x, whole, left), load_part(zero, delta, whole, left))
        store_part(value, x, whole, left)
        value = rounded(value, x)
        squares = multiply_add(value, value, squares)
    return total(squares)


@called
def _square_row(x: Any, size: int) -> Any:
    """The sum of squares."""
    zero = zeros(LANES)
    squares = zero
    whole = size // LANES * LANES
    for at in range(0, whole, LANES):
        value = load(zero, x, at)
        squares = multiply_add(value, value, squares)
    if whole < size:
        value = load_part(zero, x, whole, size - whole)
        squares = multiply_add(value, value, squares)
    return total(squares)


@called
def _normalize_row(x: Any, scale: Any, target: Any, size: int) -> None:
    """target = scale * x."""
    factor = broadcast(zeros(LANES), scale)
    whole = size // LANES * LANES
    for at in range(0, whole, LANES):
        store(multiply(load(factor, x, at), factor), target, at)
    if whole < size:
        left = size - whole
        store_part(multiply(load_part(factor, x, whole, left), factor), target, whole, left)


@called
def _scale_row(x: Any, scale: Any, weight: Any, target: Any, size: int) -> None:
    """target = weight * (scale * x), rounded after each product."""
    factor = broadcast(zeros(LANES), scale)
    whole = size // LANES * LANES
    for at in range(0, whole, LANES):
        value = rounded(multiply(load(factor, x, at), factor), x)
        store(multiply(value, load(factor, weight, at)), target, at)
    if whole < size:
        left = size - whole
        value = rounded(multiply(load_part(factor, x, whole, left), factor), x)
        weights = load_part(factor, weight, whole, left)
        store_part(multiply(value, weights), target, whole, left)
