"""Compile or load every kernel for a dtype before the first request.

Called through kernels/cpu by whoever starts an engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraswarm.kernels import AttentionWork, TileTable
from loraswarm.kernels.cpu.lora import lora_expand_, lora_shrink
from loraswarm.kernels.cpu.paged import paged_attention, write_kv_


def warm_up(dtype_name: str, report: Callable[[str], None]) -> None:
    """Make every kernel ready for tensors of a dtype; `report` gets one line per stage.

    Cost     about 20 s per dtype once per machine and version, then under a second.
    """
    dtype = getattr(torch, dtype_name)
    report(f"lora_shrink {dtype_name}")
    case = LoraUpdate(dtype, num_tokens=1, width=32)
    h_QTR = case.shrink()
    report(f"lora_expand_ {dtype_name}")
    case.expand_(h_QTR)
    report(f"write_kv_ {dtype_name}")
    pages = torch.zeros(1, 1, 2, 1, 16, 16, dtype=dtype)
    new_TKE = torch.zeros(1, 1, 16, dtype=dtype)
    write_kv_(pages, 0, new_TKE, new_TKE, torch.zeros(1, dtype=torch.int64))
    report(f"paged_attention {dtype_name}")
    zero = torch.zeros(1, dtype=torch.int32)
    one_token = AttentionWork(torch.tensor([0, 1], dtype=torch.int32), zero + 1, zero[None], 1, 1)
    paged_attention(new_TKE, pages, 0, one_token, 1.0, None)


class LoraUpdate:
    """One segment with one tile of 16 ranks."""

    def __init__(self, dtype: torch.dtype, num_tokens: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._x_TI = torch.randn(num_tokens, width, generator=generator).to(dtype)
        self._pool = torch.randn(2 * 16 * width, generator=generator).to(dtype)
        self._tiles = TileTable(
            segments=torch.tensor([0, num_tokens], dtype=torch.int32),
            ranges=torch.tensor([[[0, 1]]], dtype=torch.int32),
            a_offset=torch.tensor([0]),
            bt_offset=torch.tensor([16 * width]),
            a_stride=torch.tensor([width]),
            bt_stride=torch.tensor([width]),
            ranks=torch.tensor([16], dtype=torch.int32),
            scale=torch.tensor([1.0]),
            u_offset=torch.tensor([-1]),
            v_offset=torch.tensor([-1]),
            gain_offset=torch.full((1, 1, 2), -1),
            max_tiles=(1,),
            has_gains=(False,),
        )

    def shrink(self) -> torch.Tensor:
        return lora_shrink(self._x_TI, self._pool, self._tiles, 0, 1)

    def expand_(self, h_QTR: torch.Tensor) -> None:
        bounds = (0, self._x_TI.shape[1])
        lora_expand_(torch.zeros_like(self._x_TI), h_QTR, self._pool, self._tiles, 0, bounds)
