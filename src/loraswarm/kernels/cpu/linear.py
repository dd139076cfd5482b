"""The product of tokens with a packed bfloat16 weight: y = x Wᵀ + bias.

A weight is packed once into panels of 32 columns (kernels/cpu/dot); packing changes no bits. An
item of the operation is some panels for some rows. Called by kernels/cpu/operations and, to record
an operation, by kernels/cpu/products.
Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loraswarm.kernels.cpu.dot import (
    CHUNK_PAIRS,
    FEW_ROWS,
    HAS_DOT,
    MAX_ROWS,
    PANEL_COLUMNS,
    dot_panel,
)
from loraswarm.kernels.cpu.jit import called, threads
from loraswarm.kernels.cpu.memory import float_at, memory_at, moved
from loraswarm.kernels.cpu.vectors import (
    add,
    load,
    load_up_to,
    rounded,
    store_up_to,
    zeros,
)
from loraswarm.kernels.huge_pages import empty_in_huge_pages

LANES = 16
LINE_ELEMENTS = 32
LINES_PER_PAIR = 2 * PANEL_COLUMNS // LINE_ELEMENTS
ROWS_PER_ITEM = 192
ITEM_PRODUCTS = 1 << 21
ITEM_BYTES = 1 << 18
"""About 10 microseconds of one core, bound by arithmetic or by memory: enough to hide the taking of
an item, little enough that threads end together."""
SUMS = MAX_ROWS * PANEL_COLUMNS


class PackedWeight:
    """A weight [O, I] in panels; `panels` is flat, of the weight's dtype, padded with zeros."""

    __slots__ = ("address", "in_features", "num_panels", "out_features", "panels")

    def __init__(self, panels: Tensor, out_features: int, in_features: int) -> None:
        self.panels = panels
        self.address = panels.data_ptr()
        self.num_panels = panels.numel() // (PANEL_COLUMNS * in_features)
        self.out_features = out_features
        self.in_features = in_features

    def unpack(self) -> Tensor:
        """[O, I] in row order: a copy of the same bits."""
        panels = self.panels.view(-1, self.in_features // 2, PANEL_COLUMNS, 2)
        rows = panels.permute(0, 2, 1, 3).reshape(-1, self.in_features)
        return rows[: self.out_features]

    def look_up(self, row_T: Tensor) -> Tensor:
        """[T, I]: the rows with these numbers, int64 below O; a copy of the same bits."""
        panels = self.panels.view(-1, self.in_features // 2, PANEL_COLUMNS, 2)
        pairs = panels[row_T // PANEL_COLUMNS, :, row_T % PANEL_COLUMNS]
        return pairs.view(-1, self.in_features)


@lru_cache(maxsize=4096)
def _cut(
    num_tokens: int, num_panels: int, in_features: int, itemsize: int
) -> tuple[int, tuple[int, int, int]]:
    """How many items a product with so many rows has, and (panels an item, groups of panels, rows
    an item)."""
    num_chunks = -(-num_tokens // ROWS_PER_ITEM)
    rows_per_item = -(-num_tokens // max(num_chunks, 1))
    panel_elements = PANEL_COLUMNS * in_features
    panels_per_item = max(
        1,
        min(
            ITEM_PRODUCTS // (max(rows_per_item, 1) * panel_elements),
            ITEM_BYTES // (itemsize * panel_elements),
            num_panels // 16,
        ),
    )
    num_groups = -(-num_panels // panels_per_item)
    return num_groups * num_chunks, (panels_per_item, num_groups, rows_per_item)


def can_pack(dtype: torch.dtype, in_features: int) -> bool:
    """Whether this CPU multiplies from panels of this dtype."""
    return HAS_DOT and dtype == torch.bfloat16 and in_features % 2 == 0


def pack(weight_OI: Tensor) -> PackedWeight:
    """The weight in panels; `can_pack` must hold."""
    out_features, in_features = weight_OI.shape
    num_panels, rest = divmod(out_features, PANEL_COLUMNS)
    sizes = (num_panels + (rest > 0), in_features // 2, PANEL_COLUMNS, 2)
    panels = empty_in_huge_pages(sizes, weight_OI.dtype)
    whole, tail = weight_OI[: out_features - rest], weight_OI[out_features - rest :]
    panels[:num_panels] = whole.view(-1, PANEL_COLUMNS, *sizes[1::2]).permute(0, 2, 1, 3)
    if rest > 0:
        panels[num_panels, :, :rest] = tail.view(rest, *sizes[1::2]).permute(1, 0, 2)
    return PackedWeight(panels.view(-1), out_features, in_features)


def pack_linear(weight_OI: Tensor) -> PackedWeight | None:
    """See `kernels.reference.pack_linear`."""
    return pack(weight_OI) if can_pack(weight_OI.dtype, weight_OI.shape[1]) else None


def check_linear(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None) -> None:
    """Raise ValueError if the arguments of `linear` disagree."""
    if x_TI.dim() != 2 or x_TI.shape[1] != weight.in_features or x_TI.stride(1) != 1:
        raise ValueError(
            f"x_TI is {tuple(x_TI.shape)}; it must be [T, {weight.in_features}] with contiguous"
            " rows"
        )
    if x_TI.dtype != weight.panels.dtype:
        raise ValueError(f"x_TI is {x_TI.dtype}, the weight is {weight.panels.dtype}")
    if bias_O is not None and (bias_O.numel() != weight.out_features or bias_O.dtype != x_TI.dtype):
        raise ValueError(
            f"bias_O is {bias_O.dtype} of {bias_O.numel()}; it must be {x_TI.dtype} of"
            f" {weight.out_features}"
        )


def linear_arguments(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, y_TO: Tensor
) -> tuple[int, tuple[int, ...]]:
    """The number of items and their arguments.

    `y_TO` is written: bfloat16, or float32 with values that are rounded to bfloat16.
    """
    num_tokens = x_TI.shape[0]
    num_items, cut = _cut(num_tokens, weight.num_panels, weight.in_features, 2)
    return num_items, (
        x_TI.data_ptr(),
        x_TI.stride(0),
        num_tokens,
        weight.in_features // 2,
        weight.address,
        weight.num_panels,
        weight.out_features,
        bias_O.data_ptr() if bias_O is not None else 0,
        y_TO.data_ptr(),
        y_TO.stride(0),
        y_TO.dtype == torch.float32,
        *cut,
        threads.count,
    )


@called
def linear_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Some panels for some rows."""
    x, x_stride = memory_at(like, arguments[0]), arguments[1]
    num_tokens, num_pairs = arguments[2], arguments[3]
    panels, num_panels = memory_at(like, arguments[4]), arguments[5]
    panels_per_item, num_groups, rows_per_item = arguments[11], arguments[12], arguments[13]
    first_panel = item % num_groups * panels_per_item
    first_row = item // num_groups * rows_per_item
    end_row = min(first_row + rows_per_item, num_tokens)
    end_panel = min(first_panel + panels_per_item, num_panels)
    panel_elements = num_pairs * 2 * PANEL_COLUMNS
    num_blocks = (end_row - first_row + MAX_ROWS - 1) // MAX_ROWS
    # While a panel is multiplied, the one that this thread probably takes next is fetched: evenly,
    # so that memory and arithmetic are busy side by side. Few rows read panels in one go instead.
    lines_per_chunk = (LINES_PER_PAIR * CHUNK_PAIRS + num_blocks - 1) // max(num_blocks, 1)
    if end_row - first_row <= FEW_ROWS:
        lines_per_chunk = 0
    lines_per_block = lines_per_chunk * ((num_pairs + CHUNK_PAIRS - 1) // CHUNK_PAIRS)
    for panel in range(first_panel, end_panel):
        weights = moved(panels, panel * panel_elements)
        next_panel = panel + 1
        if next_panel == end_panel:
            next_panel = first_panel + arguments[14] * panels_per_item
        fetched = weights
        if next_panel < num_panels:
            fetched = moved(panels, next_panel * panel_elements)
        row = first_row
        for block in range(num_blocks):
            num_rows = (end_row - row + num_blocks - block - 1) // (num_blocks - block)
            part = moved(fetched, block * lines_per_block * LINE_ELEMENTS)
            x_rows = moved(x, row * x_stride)
            dot_panel(
                x_rows, x_stride, num_rows, weights, num_pairs, part, lines_per_chunk, scratch
            )
            _write_sums(arguments, row, num_rows, panel * PANEL_COLUMNS, scratch, like)
            row += num_rows


@called
def _write_sums(
    arguments: Any, first_row: int, num_rows: int, column: int, scratch: Any, like: Any
) -> None:
    """Add the bias to a block of sums, round, and store it."""
    out_features, bias = arguments[6], arguments[7]
    y_stride, is_float = arguments[9], arguments[10]
    zero = zeros(LANES)
    for low in range(0, PANEL_COLUMNS, LANES):
        count = out_features - column - low
        if count <= 0:
            return
        addend = zero
        if bias != 0:
            addend = load_up_to(zero, memory_at(like, bias), column + low, count)
        for row in range(num_rows):
            value = add(load(zero, scratch, row * PANEL_COLUMNS + low), addend)
            index = (first_row + row) * y_stride + column + low
            if is_float != 0:
                store_up_to(rounded(value, like), float_at(arguments[8]), index, count)
            else:
                store_up_to(value, memory_at(like, arguments[8]), index, count)
