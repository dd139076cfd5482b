"""A tile table as the NumPy arrays that the LoRA kernels take, made once for all sites of a step.

Same memory, no copy: what is written to a table's tensors is seen. Called by kernels/cpu/lora.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from loraswarm.kernels import TileTable
from loraswarm.kernels.cpu.tiles import TileArrays, VectorArrays


class TableArrays(NamedTuple):
    """All sites of a table."""

    segments: Any
    ranges: Any
    a_offset: Any
    bt_offset: Any
    a_stride: Any
    bt_stride: Any
    ranks: Any
    scale: Any
    u_offset: Any
    v_offset: Any
    gain_offset: Any

    def a_tiles(self, pool: Any, first_site: int, widths: tuple[int, ...]) -> TileArrays:
        """What shrink reads at the parts of one fused linear, of these in features."""
        return TileArrays(
            pool,
            self.segments,
            self.ranges[first_site : first_site + len(widths)],
            self.a_offset,
            self.a_stride,
            self.ranks,
            _as_array(widths),
        )

    def bt_tiles(self, pool: Any, first_site: int, widths: tuple[int, ...]) -> TileArrays:
        """What expand reads at the parts of one fused linear, of these out features."""
        return TileArrays(
            pool,
            self.segments,
            self.ranges[first_site : first_site + len(widths)],
            self.bt_offset,
            self.bt_stride,
            self.ranks,
            _as_array(widths),
        )

    def vectors(self, first_site: int, num_parts: int) -> VectorArrays:
        """What expand reads beside the tiles at the parts of one fused linear."""
        return VectorArrays(
            self.scale,
            self.u_offset,
            self.v_offset,
            self.gain_offset[first_site : first_site + num_parts],
        )


class LastTable:
    """Keeps the arrays of the table used last: a step calls the kernels for every linear."""

    def __init__(self) -> None:
        self._last: tuple[TileTable, TableArrays] | None = None

    def arrays(self, tiles: TileTable) -> TableArrays:
        """The table's own memory as arrays."""
        last = self._last
        if last is None or last[0] is not tiles:
            last = tiles, _arrays_of(tiles)
            self._last = last
        return last[1]


last_table = LastTable()


def _arrays_of(tiles: TileTable) -> TableArrays:
    return TableArrays(
        tiles.segments.numpy(),
        tiles.ranges.numpy(),
        tiles.a_offset.numpy(),
        tiles.bt_offset.numpy(),
        tiles.a_stride.numpy(),
        tiles.bt_stride.numpy(),
        tiles.ranks.numpy(),
        tiles.scale.numpy(),
        tiles.u_offset.numpy(),
        tiles.v_offset.numpy(),
        tiles.gain_offset.numpy(),
    )


@cache
def _as_array(numbers: tuple[int, ...]) -> Any:
    return np.array(numbers, np.int64)
