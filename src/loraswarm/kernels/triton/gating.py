"""The gated product of a feed-forward, silu(gate) * up: a program is some columns of a token.

Called through kernels/triton.
Legend: T tokens, F intermediate, B columns of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels.arguments import check_silu_multiply
from loraswarm.kernels.triton.launch import ceil_power, check_device, on_device
from loraswarm.kernels.triton.rows import check_elements

MAX_COLUMNS = 1024
WARP_COLUMNS = 256
"""8 columns a thread: 16 bytes of the 16-bit types, the most that one load brings."""


def silu_multiply(gate_up_TF2: Tensor) -> Tensor:
    """See `kernels.reference.silu_multiply`."""
    check_silu_multiply(gate_up_TF2)
    check_elements("gate_up_TF2", gate_up_TF2)
    check_device(gate_up_TF2=gate_up_TF2)
    num_tokens, size = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty(num_tokens, size, dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    if out_TF.numel() == 0:
        return out_TF
    columns = min(MAX_COLUMNS, ceil_power(size))
    with on_device(gate_up_TF2):
        _silu_multiply_kernel[(num_tokens * -(-size // columns),)](
            gate_up_TF2,
            out_TF,
            gate_up_TF2.stride(0),
            SIZE=size,
            COLUMNS=columns,
            num_warps=max(1, columns // WARP_COLUMNS),
        )
    return out_TF


@triton.jit
def _silu_multiply_kernel(gate_up, out, row_stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of one token."""
    NUM_BLOCKS: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    column_B = tl.program_id(0) % NUM_BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    is_column_B = column_B < SIZE
    gate_at_B = gate_up + token * row_stride + column_B
    gate_B = tl.load(gate_at_B, mask=is_column_B, other=0.0)
    up_B = tl.load(gate_at_B + SIZE, mask=is_column_B, other=0.0)
    value_B = gate_B.to(tl.float32)
    silu_B = (value_B / (1.0 + tl.exp(-value_B))).to(gate_B.dtype)
    gated_B = (silu_B.to(tl.float32) * up_B.to(tl.float32)).to(gate_B.dtype)
    tl.store(out + token * SIZE + column_B, gated_B, mask=is_column_B)
