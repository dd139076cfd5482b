"""The tensor behind the page pool and its two typed views.

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
                 | tile | tile | tile | ... | unused                                (adapter)

    `pages` is [P, layers, 2, K, C, E], `pool` is flat; both in the base's dtype and over the same
    bytes. Memory is not cleared.
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
        self.pages: Tensor = self.pool.view(
            num_pages,
            shape.num_layers,
            2,
            shape.num_kv_heads,
            geometry.page_tokens,
            shape.head_size,
        )

    def write(self, page: int, element: int, block: Tensor) -> int:
        """Copy a contiguous block into `page` from `element` on; returns its offset in `pool`."""
        assert element + block.numel() <= self.geometry.page_elements
        offset = page * self.geometry.page_elements + element
        self.pool[offset : offset + block.numel()].copy_(block.reshape(-1))
        return offset
