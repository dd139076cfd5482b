"""A copy of a linear's weight with an adapter merged into it, made some rows at a time.

Reads the base's weight and the adapter's tiles in the pool, and writes neither. Knows no adapters
but as a tile table of one segment. Made by LoraLinear, driven by engine/merging.
Legend: O out features, I in features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraswarm.kernels import Kernels, TileTable, reference
from loraswarm.kernels.reference_merging import MERGE_ROWS
from loraswarm.models.layers.weight import Weight


class MergedCopy:
    """W + the adapter's update, in float32 and rounded once to the weight's dtype.

    Complete when `is_whole`; the base's weight may be in use meanwhile. `is_finite` turns False if
    the dtype cannot hold a value: then the copy must not be used.
    """

    def __init__(
        self,
        base: Weight,
        spare: Weight | None,
        kernels: Kernels,
        place: tuple[int, tuple[int, ...]],
    ) -> None:
        """`place` is the first site and where the parts begin and end."""
        self._kernels = kernels
        self._first_site, self._out_bounds = place
        self._has_panels = base.panels is not None
        self._is_repacked = base.is_packed and not self._has_panels
        self._source = base.panels if self._has_panels else base.rows
        self._weight = spare
        if spare is None or self._is_repacked:
            self._weight = base.blank(kernels)
        self.num_rows, self._num_done = self._out_bounds[-1], 0
        self.row_bytes = base.nbytes // self.num_rows
        self.is_finite = True

    @property
    def num_left(self) -> int:
        """Rows that are still to be merged."""
        return self.num_rows - self._num_done

    @property
    def weight(self) -> Weight:
        """What is written to; to be multiplied by once nothing is left."""
        assert self._weight is not None
        return self._weight

    @torch.inference_mode()
    def extend(self, num_rows: int, pool: Tensor, tiles: TileTable) -> int:
        """Merge about so many rows more, in multiples of MERGE_ROWS; returns how many bytes."""
        begin = self._num_done
        end = begin + max(1, num_rows // MERGE_ROWS) * MERGE_ROWS
        end = min(end, self.num_rows)
        weight = self.weight
        target: Any = weight.panels if self._has_panels else weight.rows
        merge = self._kernels.merge_linear_ if self._has_panels else reference.merge_linear_
        place = self._first_site, self._out_bounds
        merge(target, self._source, pool, tiles, *place, (begin, end))
        self._num_done = end
        if pool.dtype == torch.float16:
            rows_OI = target.unpack() if self._has_panels else target
            self.is_finite = self.is_finite and bool(rows_OI[begin:end].isfinite().all())
        if end == self.num_rows:
            self._source = None
            if self._is_repacked:
                weight.pack_()
        return (end - begin) * self.row_bytes
