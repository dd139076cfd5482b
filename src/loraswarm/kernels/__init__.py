"""Pure functions on tensors, one module per kind of device behind one contract.

`reference` is the definition in plain torch; `cpu` and `triton` must equal it. This module holds
the index structures the kernels read and the protocol they satisfy; it owns no memory.

Legend: T tokens, S sequences, G segments, N tiles, I in features, O out features, R rank columns,
Q parts of a fused linear, H query heads, K kv heads, E head size, P pages, C tokens per page.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

MAX_TILE_RANKS = 16


@dataclass(frozen=True, slots=True)
class TileTable:
    """Which tiles every segment of a batch runs, at every site.

    Sites are numbered by core/base_shape. Segment g covers tokens `segments[g] : segments[g + 1]`;
    at site m it runs tiles `ranges[m, g, 0] : ranges[m, g, 1]` of the arrays below, none if they
    are equal. Tile n multiplies by A [ranks[n], I] and adds scale[n] * Bt [ranks[n], O]; row i of A
    begins at element `a_offset[n] + i * a_stride[n]` of the pool, and of Bt likewise. Rows longer
    than I or O (a stride that is larger) are matrices which several modules share.

        pool   ... | A row 0 | A row 1 | ... | ... | Bt row 0 | Bt row 1 | ...
                   ^ a_offset[n]                   ^ bt_offset[n]

    Vectors lie in the same pool as float32: offsets count elements of `pool.view(float32)`, and -1
    stands for a vector of ones (u, v, g) or of zeros (c). u [ranks[n]] and v [O] belong to a tile;
    g and c [O] to a segment at a site, which may have them without tiles:

        y = g * (y + sum of v[n] * (Bt[n]^T (scale[n] * u[n] * (A[n] x)))) + c

    Shapes    segments [G+1] int32, ascending from 0 to T; ranges [sites, G, 2] int32;
              a_offset, bt_offset, a_stride, bt_stride [N] int64; ranks [N] int32, 1..16;
              scale [N] float32; u_offset, v_offset [N] int64;
              gain_offset [sites, G, 2] int64: of g and of c.
    All tensors are on the host, whatever device the pool is on: a backend makes of a table what its
    kernels need. Tokens beyond `segments[-1]` are padding and belong to none. `max_tiles[m]` is the
    most tiles any segment runs at site m, `has_gains[m]` whether any segment has g or c there.
    """

    segments: Tensor
    ranges: Tensor
    a_offset: Tensor
    bt_offset: Tensor
    a_stride: Tensor
    bt_stride: Tensor
    ranks: Tensor
    scale: Tensor
    u_offset: Tensor
    v_offset: Tensor
    gain_offset: Tensor
    max_tiles: tuple[int, ...]
    has_gains: tuple[bool, ...]

    def part_tiles(self, first_site: int, num_parts: int) -> int:
        """Most tiles of any segment over the parts of one fused linear; 0: nothing to shrink."""
        return max(self.max_tiles[first_site : first_site + num_parts])

    def changes(self, first_site: int, num_parts: int) -> bool:
        """Whether any segment has tiles or gains at the parts of one fused linear."""
        parts = slice(first_site, first_site + num_parts)
        return any(self.max_tiles[parts]) or any(self.has_gains[parts])


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Which tokens attend to which pages.

    Sequence s owns tokens `query_starts[s] : query_starts[s + 1]` of the batch, the last of its
    `context_lens[s]` tokens (their K and V are already written). Token c of the sequence lies in
    page `page_table[s, c // C]` at row `c % C`.

    Shapes    query_starts [S+1] int32; context_lens [S] int32; page_table [S, max pages] int32,
              padded with 0.
    `max_query_tokens`, `max_context_tokens` are host copies of the maxima, or more. Where batches
    are padded for graphs (kernels/triton), a sequence of context length 0 is padding: what its
    tokens get is undefined. So is a token whose slot is negative: its K and V are not stored.
    """

    query_starts: Tensor
    context_lens: Tensor
    page_table: Tensor
    max_query_tokens: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Factors of the columns of every normalised head of q and of k, each [E]; eps as in a norm."""

    q_weight_E: Tensor
    k_weight_E: Tensor
    eps: float


class Kernels(Protocol):
    """What every backend offers. Semantics, shapes and errors: `kernels.reference`."""

    def lora_shrink(
        self, x_TI: Tensor, pool: Tensor, tiles: TileTable, first_site: int, num_parts: int
    ) -> Tensor: ...

    def lora_expand_(
        self,
        y_TO: Tensor,
        h_QTR: Tensor,
        pool: Tensor,
        tiles: TileTable,
        first_site: int,
        out_bounds: tuple[int, ...],
    ) -> None: ...

    def write_kv_(
        self, pages: Tensor, layer: int, k_TKE: Tensor, v_TKE: Tensor, slots_T: Tensor
    ) -> None: ...

    def rotate_and_write_kv_(
        self,
        qkv_TNE: Tensor,
        num_heads: int,
        cos_T1E: Tensor,
        sin_T1E: Tensor,
        pages: Tensor,
        layer: int,
        slots_T: Tensor,
        norms: HeadNorms | None = None,
    ) -> None: ...

    def paged_attention(
        self,
        q_THE: Tensor,
        pages: Tensor,
        layer: int,
        work: AttentionWork,
        scale: float,
        window: int | None,
    ) -> Tensor: ...

    def add_rms_norm_(
        self,
        x_TD: Tensor,
        delta_TD: Tensor | None,
        weight_D: Tensor | None,
        eps: float,
        rows_Z: Tensor | None = None,
    ) -> Tensor: ...

    def silu_multiply(self, gate_up_TF2: Tensor) -> Tensor: ...

    def pack_linear(self, weight_OI: Tensor) -> Any | None: ...

    def empty_linear(self, weight: Any) -> Any: ...

    def linear_norm(self, weight: Any) -> float: ...

    def merge_linear_(
        self,
        merged: Any,
        weight: Any,
        pool: Tensor,
        tiles: TileTable,
        first_site: int,
        out_bounds: tuple[int, ...],
        rows: tuple[int, int],
    ) -> None: ...

    def linear(
        self, x_TI: Tensor, weight: Any, bias_O: Tensor | None, is_float32: bool = False
    ) -> Tensor: ...

    def linear_shrink(
        self,
        x_TI: Tensor,
        weight: Any,
        bias_O: Tensor | None,
        pool: Tensor,
        tiles: TileTable,
        first_site: int,
        num_parts: int,
    ) -> tuple[Tensor, Tensor]: ...

    def recording(self) -> AbstractContextManager[None]: ...

    def finish(self) -> None: ...

    def warm_up(self, dtype_name: str, report: Callable[[str], None]) -> None:
        """Compile every kernel for a dtype; `report` gets one line per stage."""
        ...
