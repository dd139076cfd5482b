"""The words of a plan: the sections of one packed tensor, and a host table that fills them.

Knows the layout that the LoRA kernels read, not when plans are made. Called by plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraswarm.kernels.triton import items as work
from loraswarm.kernels.triton.extents import SiteExtents, check_segments
from loraswarm.kernels.triton.launch import IS_INTERPRETED, ceil_power

# Words of a tile, int64; the scale is a float32 in the lower half of the last.
A_OFFSET, A_STRIDE, BT_OFFSET, BT_STRIDE = 0, 1, 2, 3
U_OFFSET, V_OFFSET, RANKS, SCALE = 4, 5, 6, 7
TILE_WORDS = 8
GAIN_WORDS = 2
SECTION_WORDS = 16
"""Sections begin on 64 bytes."""
ROOM = 1024
"""Sections that are to hold other tables too have room for so many records at least."""


class Sizes(NamedTuple):
    """How many records each section holds."""

    num_sites: int
    num_tiles: int
    num_gains: int
    num_shrink_items: int
    num_expand_items: int

    def words(self) -> tuple[int, ...]:
        """Words of int32 in each section, none empty."""
        counts = (
            2 * (self.num_sites + 1),
            2 * TILE_WORDS * self.num_tiles,
            2 * GAIN_WORDS * self.num_gains,
            work.ITEM_WORDS * self.num_shrink_items,
            work.ITEM_WORDS * self.num_expand_items,
        )
        return tuple([max(-(-count // SECTION_WORDS), 1) * SECTION_WORDS for count in counts])

    def with_room(self) -> Sizes:
        """Sizes that hold these and leave room."""
        return Sizes(self.num_sites, *[ceil_power(max(count, ROOM)) for count in self[1:]])

    def hold(self, others: Sizes) -> bool:
        """Whether tables of the sizes `others` fit in."""
        is_enough = all(mine >= other for mine, other in zip(self, others, strict=True))
        return is_enough and self.num_sites == others.num_sites


class PlanWords:
    """Views of the sections of one packed tensor of int32, the same on the host and the device.

    | starts of shrink items, of expand items | tiles | gains | shrink items | expand items |
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes = sizes
        counts = sizes.words()
        bounds = [sum(counts[:index]) for index in range(len(counts) + 1)]
        is_pinned = device.type == "cpu" and not IS_INTERPRETED and torch.cuda.is_available()
        self.packed = torch.empty(
            bounds[-1], dtype=torch.int32, device=device, pin_memory=is_pinned
        )
        self.sections = tuple([self.packed[low:high] for low, high in pairwise(bounds)])
        starts, tiles, gains, self.shrink_items, self.expand_items = self.sections
        self.shrink_starts = starts[: sizes.num_sites + 1]
        self.expand_starts = starts[sizes.num_sites + 1 : 2 * (sizes.num_sites + 1)]
        self.tiles = tiles.view(torch.int64)
        self.scales = tiles.view(torch.float32)
        self.gains = gains.view(torch.int64)


class HostTable:
    """One table, cut into items; `arrays` are a TileTable's by name, checked but for segments.

    Raises    ValueError if the segments are wrong.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        extents: SiteExtents,
        cut: work.Cut | None = None,
    ) -> None:
        segments, ranges = arrays["segments"], arrays["ranges"]
        check_segments(segments, ranges)
        self.extents = extents
        self.num_tokens = int(segments[-1])
        self.cut = cut or work.choose_cut(int(np.diff(segments).max(initial=0)))
        self.shrink = work.shrink_items(segments, ranges, self.cut)
        self.expand = work.expand_items(segments, ranges, arrays["gain_offset"], self.cut)
        self._arrays = arrays
        self._gains = work.pairs_of_gains(arrays["gain_offset"])
        self.sizes = Sizes(
            num_sites=ranges.shape[0],
            num_tiles=arrays["a_offset"].size,
            num_gains=len(self._gains),
            num_shrink_items=self.shrink.num_items,
            num_expand_items=self.expand.num_items,
        )

    def words(self) -> PlanWords:
        """Everything that kernels read of it, in host memory (pinned where there is CUDA)."""
        host = PlanWords(self.sizes, torch.device("cpu"))
        host.shrink_starts.numpy()[:] = self.shrink.starts
        host.expand_starts.numpy()[:] = self.expand.starts
        self._write_tiles(host)
        _records(host.gains, GAIN_WORDS, self.sizes.num_gains)[:] = self._gains
        segments, ranges = self._arrays["segments"], self._arrays["ranges"]
        words = _records(host.shrink_items, work.ITEM_WORDS, self.shrink.num_items)
        work.write_shrink(self.shrink, words, segments, ranges, self.cut)
        words = _records(host.expand_items, work.ITEM_WORDS, self.expand.num_items)
        gain_offset = self._arrays["gain_offset"]
        work.write_expand(self.expand, words, segments, ranges, gain_offset, self.cut)
        return host

    def _write_tiles(self, host: PlanWords) -> None:
        tiles = _records(host.tiles, TILE_WORDS, self.sizes.num_tiles)
        for word, name in (
            (A_OFFSET, "a_offset"),
            (A_STRIDE, "a_stride"),
            (BT_OFFSET, "bt_offset"),
            (BT_STRIDE, "bt_stride"),
            (U_OFFSET, "u_offset"),
            (V_OFFSET, "v_offset"),
            (RANKS, "ranks"),
        ):
            tiles[:, word] = self._arrays[name]
        scales = _records(host.scales, 2 * TILE_WORDS, self.sizes.num_tiles)
        scales[:, 2 * SCALE] = self._arrays["scale"]


def _records(section: Tensor, num_words: int, count: int) -> Any:
    """The first records of a section of the host as an array [count, num_words]."""
    return section.numpy()[: num_words * count].reshape(count, num_words)
