"""Rows of a matrix that lie in pages, and which tokens of a batch use them.

An overlay replaces a norm's weight, a table of embeddings or the lm_head for the tokens of some
requests, or holds the wide side of LoRA on the embedding. Plain torch on views of the pool, the
same on every device; owns no memory. Built by memory/tile_store, used by models/layers.

Legend: T tokens, I in features, W width of a row, N rows, B blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedRows:
    """A matrix [num_rows, width] in the pool, cut into blocks of whole rows.

    Row i lies at element `offsets[i // rows_per_block] + i % rows_per_block * width`.

        pool   ... | rows 0 .. rows_per_block - 1 | ... | the next rows_per_block rows | ...
                   ^ offsets[0]                         ^ offsets[1]

    Shapes    offsets [B] int64 on the pool's device; `block_offsets` is a host copy.
    """

    offsets: Tensor
    block_offsets: tuple[int, ...]
    rows_per_block: int
    num_rows: int
    width: int


@dataclass(frozen=True, slots=True)
class Overlay:
    """`rows` are used for tokens `begin : end` of the batch.

    With `token_ids` [num_rows] int64, ascending, they stand for those rows of the base's table
    only; without, for all of it. Rows of the wide side of LoRA on the embedding go to columns of
    h from `first_column` on (`kernels.reference.lora_shrink`).
    """

    begin: int
    end: int
    rows: PagedRows
    token_ids: Tensor | None = None
    first_column: int = 0


Overlays = Mapping[str, tuple[Overlay, ...]]
"""By the path of the module (`model.norm`); tokens of one module's overlays do not overlap."""


def gather_rows(pool: Tensor, rows: PagedRows, ids_T: Tensor) -> Tensor:
    """Rows `ids_T` of the matrix: [T, W] of the pool's dtype, a new tensor; ids are in range."""
    starts_T = rows.offsets[ids_T // rows.rows_per_block]
    starts_T = starts_T + ids_T % rows.rows_per_block * rows.width
    columns_W = torch.arange(rows.width, device=pool.device)
    return pool[starts_T[:, None] + columns_W]


def multiply_rows(x_TI: Tensor, pool: Tensor, rows: PagedRows) -> Tensor:
    """x times the matrix transposed: [T, N] of x's dtype, a new tensor. The rows' width is I."""
    blocks = [x_TI @ block_NI.T for block_NI in row_blocks(pool, rows)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def row_blocks(pool: Tensor, rows: PagedRows) -> list[Tensor]:
    """The matrix as views of the pool, each [at most rows_per_block, W]."""
    views = []
    for index, offset in enumerate(rows.block_offsets):
        count = min(rows.rows_per_block, rows.num_rows - index * rows.rows_per_block)
        views.append(pool[offset : offset + count * rows.width].view(count, rows.width))
    return views
