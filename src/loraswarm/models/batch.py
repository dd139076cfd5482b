"""The tensors of one forward pass: the only thing a model sees.

Built by engine/prepare for each step. Tokens of one sequence are adjacent; sequences of one adapter
are adjacent and form a segment of `tiles`.
Legend: T tokens, S sequences, K kv heads, C tokens per page, E head size, P pages, Z logit rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraswarm.kernels import AttentionWork, TileTable


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    `slots` says where each token's K and V go (page * C + row); `logit_rows` picks the tokens whose
    logits are wanted. `tiles` is None when no row has an adapter.

    Shapes    token_ids, positions, slots [T] int64; logit_rows [Z] int64;
              pages [P, layers, 2, K, C, E] and pool [elements]: two views of the page buffer.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    logit_rows: Tensor
    attention: AttentionWork
    tiles: TileTable | None
    pages: Tensor
    pool: Tensor
