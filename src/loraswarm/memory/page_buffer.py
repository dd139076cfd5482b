"""The tensor behind the page pool and its typed views.

Owns the bytes of every page; does not know which page belongs to whom.
Legend: P pages, K kv heads, C tokens per page, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.core.base_shape import BaseShape
from loraswarm.memory.geometry import PageGeometry


class PageBuffer:
    """`num_pages` pages on one device, seen as K/V pages and as one flat array of elements.

        page p   | layer 0: K [K, C, E] | V [K, C, E] | layer 1: K | V | ...       (K/V)
                 | block | block | block | ... | unused                            (adapters)

    `pages` is [P, layers, 2, K, C, E], `pool` is flat; both in the base's dtype and over the same
    bytes, as is `floats`, flat float32. Memory is not cleared.
    """

    def __init__(
        self,
        num_pages: int,
        shape: BaseShape,
        geometry: PageGeometry,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert geometry.element_bytes == dtype.itemsize
        self.geometry = geometry
        self._bytes = torch.empty(num_pages * geometry.page_bytes, dtype=torch.uint8, device=device)
        self.pool: Tensor = self._bytes.view(dtype)
        self.floats: Tensor = self._bytes.view(torch.float32)
        self.pages: Tensor = self.pool.view(
            num_pages,
            shape.num_layers,
            2,
            shape.num_kv_heads,
            geometry.page_tokens,
            shape.head_size,
        )

    def write(self, offset: int, block: Tensor) -> None:
        """Copy a matrix into `pool` from `offset` on, row after row, inside one page."""
        self._check(offset, block.numel())
        self.pool[offset : offset + block.numel()].view(block.shape).copy_(block)

    def write_floats(self, offset: int, vector: Tensor) -> None:
        """Copy a float32 vector, unrounded, inside one page; `offset` counts as in `pool`."""
        per_float = self.geometry.float32_elements
        assert vector.dtype == torch.float32
        assert offset % per_float == 0
        self._check(offset, vector.numel() * per_float)
        begin = offset // per_float
        self.floats[begin : begin + vector.numel()].copy_(vector)

    def _check(self, offset: int, num_elements: int) -> None:
        room = self.geometry.page_elements - offset % self.geometry.page_elements
        assert num_elements <= room, "a block reaches beyond its page"
