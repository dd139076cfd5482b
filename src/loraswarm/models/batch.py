"""The tensors of one forward pass: the only thing a model sees.

Built by engine/prepare for each step. Tokens of one sequence are adjacent; sequences of one adapter
are adjacent and form a segment of `tiles`. What comes after the last layer, final norm and lm_head,
runs on the logit rows only, so it has a table and overlays of its own.
Legend: T tokens, S sequences, K kv heads, C tokens per page, E head size, P pages, Z logit rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from loraswarm.kernels import AttentionWork, TileTable
from loraswarm.kernels.overlay import Overlays


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    `slots` says where each token's K and V go (page * C + row); `logit_rows` picks the tokens whose
    logits are wanted, in ascending order. `tiles` is None when no row has an adapter; `head_tiles`
    is the same table with segments that count logit rows. Ranges of `overlays` count tokens, those
    of `head_overlays` logit rows.

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
    overlays: Overlays = field(default_factory=dict)
    head_tiles: TileTable | None = None
    head_overlays: Overlays = field(default_factory=dict)
