"""The smallest tile table: for kernels that are run once before the first request.

Called by the backends' warming.
"""

from __future__ import annotations

import torch

from loraswarm.kernels import MAX_TILE_RANKS, TileTable


def one_tile(width: int) -> TileTable:
    """One segment of one token with one tile of all ranks, A [ranks, width] and then Bt of the same
    shape at the begin of the pool."""
    return TileTable(
        segments=torch.tensor([0, 1], dtype=torch.int32),
        ranges=torch.tensor([[[0, 1]]], dtype=torch.int32),
        a_offset=torch.tensor([0]),
        bt_offset=torch.tensor([MAX_TILE_RANKS * width]),
        a_stride=torch.tensor([width]),
        bt_stride=torch.tensor([width]),
        ranks=torch.tensor([MAX_TILE_RANKS], dtype=torch.int32),
        scale=torch.tensor([1.0]),
        u_offset=torch.tensor([-1]),
        v_offset=torch.tensor([-1]),
        gain_offset=torch.full((1, 1, 2), -1),
        max_tiles=(1,),
        has_gains=(False,),
    )
