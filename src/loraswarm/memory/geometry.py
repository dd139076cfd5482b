"""How large a page is and what fits into it. Arithmetic only, no torch.

A page holds K and V of all layers for `page_tokens` tokens, or blocks of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraswarm.core.base_shape import BaseShape

MIN_PAGE_TOKENS = 16
TILE_RANKS = 16
ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """Size of a page: `page_tokens` tokens of K/V, `page_elements` elements of the base's dtype."""

    page_tokens: int
    page_elements: int
    element_bytes: int

    @property
    def page_bytes(self) -> int:
        return self.page_elements * self.element_bytes

    @property
    def alignment_elements(self) -> int:
        return ALIGNMENT_BYTES // self.element_bytes

    @property
    def float32_elements(self) -> int:
        """Elements that one float32 takes."""
        return 4 // self.element_bytes

    def pages_for_tokens(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)


def page_geometry(shape: BaseShape, element_bytes: int) -> PageGeometry:
    """The smallest power of two >= 16 tokens whose page holds a full tile of the widest target."""
    tile_elements = TILE_RANKS * shape.widest()
    page_tokens = MIN_PAGE_TOKENS
    while page_tokens * shape.kv_elements_per_token() < tile_elements:
        page_tokens *= 2
    return PageGeometry(page_tokens, page_tokens * shape.kv_elements_per_token(), element_bytes)
