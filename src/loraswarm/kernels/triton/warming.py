"""Compile every kernel for a dtype before the first request, and choose the attention of chunks.

What depends on a model's sizes is compiled by the first step of that size. Called through
kernels/triton by whoever starts an engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraswarm.kernels import MAX_TILE_RANKS, AttentionWork
from loraswarm.kernels.one_tile import one_tile
from loraswarm.kernels.triton.attention import attend_by_triton, paged_attention
from loraswarm.kernels.triton.attention_torch import torch_choice
from loraswarm.kernels.triton.launch import DEVICE_TYPE
from loraswarm.kernels.triton.lora import lora_expand_, lora_shrink
from loraswarm.kernels.triton.rotating import write_kv_

WIDTH = 64


def warm_up(dtype_name: str, report: Callable[[str], None]) -> None:
    """Run the kernels once on the current device; `report` gets one line per stage.

    Cost     seconds once per machine and version, then under one.
    """
    dtype, device = getattr(torch, dtype_name), torch.device(DEVICE_TYPE)
    report(f"lora_shrink {dtype_name}")
    x_TI = torch.ones(1, WIDTH, dtype=dtype, device=device)
    pool = torch.ones(2 * MAX_TILE_RANKS * WIDTH, dtype=dtype, device=device)
    tiles = one_tile(WIDTH)
    h_QTR = lora_shrink(x_TI, pool, tiles, 0, 1)
    report(f"lora_expand_ {dtype_name}")
    lora_expand_(x_TI.clone(), h_QTR, pool, tiles, 0, (0, WIDTH))
    report(f"write_kv_ {dtype_name}")
    pages = torch.zeros(1, 1, 2, 1, 16, 16, dtype=dtype, device=device)
    new_TKE = torch.zeros(1, 1, 16, dtype=dtype, device=device)
    write_kv_(pages, 0, new_TKE, new_TKE, torch.zeros(1, dtype=torch.int64, device=device))
    report(f"paged_attention {dtype_name}")
    for num_tokens in (1, 2):
        paged_attention(
            torch.zeros(num_tokens, 1, 16, dtype=dtype, device=device),
            pages,
            0,
            _one_sequence(num_tokens, device),
            1.0,
            None,
        )
    if dtype != torch.float32:  # which torch's does not take
        report(torch_choice.try_on(dtype, attend_by_triton))


def _one_sequence(num_tokens: int, device: torch.device) -> AttentionWork:
    return AttentionWork(
        torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        torch.tensor([num_tokens], dtype=torch.int32, device=device),
        torch.zeros(1, 1, dtype=torch.int32, device=device),
        num_tokens,
        num_tokens,
    )
