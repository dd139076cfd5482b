"""LoRA on the CPU: each segment takes the path that measures faster for its length.

Short segments run in Numba kernels, long ones as matrix products in torch; where one begins to win
is measured at start, per dtype. Called through kernels/cpu.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import torch
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, TileTable, reference
from loraswarm.kernels.cpu.arrays import bits, flat_bits
from loraswarm.kernels.cpu.expand import Rows, expand
from loraswarm.kernels.cpu.jit import threads
from loraswarm.kernels.cpu.prefill import expand_long_, shrink_long
from loraswarm.kernels.cpu.shrink import shrink
from loraswarm.kernels.cpu.table import last_table
from loraswarm.kernels.cpu.tiles import Limits


class Crossover:
    """The longest segment, in tokens, that the Numba kernels take; kept per dtype."""

    def __init__(self) -> None:
        self._max_tokens: dict[torch.dtype, int] = {}

    def max_tokens(self, dtype: torch.dtype) -> int:
        """What was set; every segment, where nothing was."""
        return self._max_tokens.get(dtype, sys.maxsize)

    def set_max_tokens(self, dtype: torch.dtype, max_tokens: int) -> None:
        """Segments of more tokens than this run in torch."""
        self._max_tokens[dtype] = max_tokens


crossover = Crossover()


def lora_shrink(
    x_TI: Tensor, pool: Tensor, tiles: TileTable, first_site: int, num_parts: int
) -> Tensor:
    """See `kernels.reference.lora_shrink`."""
    reference.check_shrink(x_TI, pool, tiles)
    reference.check_sites(tiles, first_site, num_parts)
    num_tokens, in_features = x_TI.shape
    num_columns = MAX_TILE_RANKS * tiles.part_tiles(first_site, num_parts)
    h_QTR = torch.empty(num_parts, num_tokens, num_columns, dtype=torch.float32)
    if h_QTR.numel() == 0:
        return h_QTR
    widths = (in_features,) * num_parts
    arrays = last_table.arrays(tiles).a_tiles(bits("pool", pool), first_site, widths)
    max_tokens = crossover.max_tokens(x_TI.dtype)
    limits = Limits(max_tokens, threads.wake(_num_products(tiles, h_QTR, in_features)))
    shrink(bits("x_TI", x_TI), h_QTR.numpy(), arrays, limits)
    if num_tokens > max_tokens:
        shrink_long(x_TI, h_QTR, pool, tiles, first_site, max_tokens)
    return h_QTR


def lora_expand_(
    y_TO: Tensor,
    h_QTR: Tensor,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
) -> None:
    """See `kernels.reference.lora_expand_`."""
    reference.check_expand(y_TO, h_QTR, pool, tiles, out_bounds)
    reference.check_sites(tiles, first_site, len(out_bounds) - 1)
    if y_TO.numel() == 0 or not tiles.changes(first_site, len(out_bounds) - 1):
        return
    widths = tuple(high - low for low, high in pairwise(out_bounds))
    table = last_table.arrays(tiles)
    arrays = table.bt_tiles(bits("pool", pool), first_site, widths)
    vectors = table.vectors(first_site, len(widths))
    max_tokens = crossover.max_tokens(y_TO.dtype)
    limits = Limits(max_tokens, threads.wake(_num_products(tiles, h_QTR, y_TO.shape[1])))
    y_rows = Rows(flat_bits("y_TO", y_TO), y_TO.stride(0))
    expand(y_rows, h_QTR.numpy(), arrays, vectors, limits)
    if y_TO.shape[0] > max_tokens:
        expand_long_(y_TO, h_QTR, pool, tiles, (first_site, out_bounds), max_tokens)


def _num_products(tiles: TileTable, h_QTR: Tensor, width: int) -> int:
    """About how many numbers of the pool are multiplied; four tokens cost about as much as one."""
    num_parts, num_tokens, num_columns = h_QTR.shape
    num_segments = tiles.ranges.shape[1]
    return num_parts * max(num_columns, 1) * width * max(num_segments, num_tokens // 4)
