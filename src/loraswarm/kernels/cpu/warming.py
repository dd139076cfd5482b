"""Compile or load every kernel for a dtype before the first request.

Called through kernels/cpu by whoever starts an engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraswarm.kernels import MAX_TILE_RANKS, AttentionWork
from loraswarm.kernels.cpu.lora import lora_expand_, lora_shrink
from loraswarm.kernels.cpu.paged import paged_attention, write_kv_
from loraswarm.kernels.one_tile import one_tile

WIDTH = 32


def warm_up(dtype_name: str, report: Callable[[str], None]) -> None:
    """Make every kernel ready for tensors of a dtype; `report` gets one line per stage.

    Cost     about 20 s per dtype once per machine and version, then under a second.
    """
    dtype = getattr(torch, dtype_name)
    report(f"lora_shrink {dtype_name}")
    x_TI = torch.ones(1, WIDTH, dtype=dtype)
    pool, tiles = torch.ones(2 * MAX_TILE_RANKS * WIDTH, dtype=dtype), one_tile(WIDTH)
    h_QTR = lora_shrink(x_TI, pool, tiles, 0, 1)
    report(f"lora_expand_ {dtype_name}")
    lora_expand_(x_TI.clone(), h_QTR, pool, tiles, 0, (0, WIDTH))
    report(f"write_kv_ {dtype_name}")
    pages = torch.zeros(1, 1, 2, 1, 16, 16, dtype=dtype)
    new_TKE = torch.zeros(1, 1, 16, dtype=dtype)
    write_kv_(pages, 0, new_TKE, new_TKE, torch.zeros(1, dtype=torch.int64))
    report(f"paged_attention {dtype_name}")
    zero = torch.zeros(1, dtype=torch.int32)
    one_token = AttentionWork(torch.tensor([0, 1], dtype=torch.int32), zero + 1, zero[None], 1, 1)
    paged_attention(new_TKE, pages, 0, one_token, 1.0, None)
