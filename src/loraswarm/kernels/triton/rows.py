"""The largest element of every row of logits, and which tensors the kernels of rows take.

Knows nothing about sampling parameters. Called by the sampler of a CUDA device; `check_elements` by
norm, gating and rotating.
Legend: Z rows, V vocabulary, N blocks, B tokens of a block.

    a row of logits   | block 0 | block 1 | ... | block N-1, cut off at V |
                           |         |                 |
                       key, token  key, token  ...  key, token             one program each
                           '---------'-----.-----------'
                                      best, token                          one program a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels.arguments import require
from loraswarm.kernels.triton.launch import ceil_power, check_device, on_device

ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_TOKENS = 4096
"""16 KiB: enough programs for every core at one row, enough to load for each."""
BLOCK_WARPS = 8


def check_elements(name: str, tensor: Tensor) -> None:
    """Raise ValueError naming the tensor unless it has one of the types that kernels compute in."""
    names = ", ".join(str(dtype) for dtype in ELEMENTS)
    require(tensor.dtype in ELEMENTS, f"{name} is {tensor.dtype}; the triton kernels take {names}")


def best_tokens(rows_ZV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest element of each row and where it is first; NaN is larger than any number.

    Shapes    rows [Z, V] float32, V >= 1, rows may lie apart; returns [Z] float32, [Z] int64. The
              two zeros are alike and returned as 0.
    Raises    ValueError naming rows_ZV, for a wrong dtype or shape.
    """
    require(
        rows_ZV.dim() == 2 and rows_ZV.shape[1] >= 1 and rows_ZV.stride(1) == 1,
        "rows_ZV must be [Z, V] with contiguous rows of at least one token",
    )
    require(rows_ZV.dtype == torch.float32, f"rows_ZV is {rows_ZV.dtype}; it must be float32")
    check_device(rows_ZV=rows_ZV)
    num_rows, vocab_size = rows_ZV.shape
    num_blocks = -(-vocab_size // BLOCK_TOKENS)
    device = rows_ZV.device
    key_ZN = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    token_ZN = torch.empty_like(key_ZN)
    best_Z = torch.empty(num_rows, dtype=torch.float32, device=device)
    token_Z = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return best_Z, token_Z
    with on_device(rows_ZV):
        _best_of_block_kernel[(num_rows * num_blocks,)](
            rows_ZV,
            key_ZN,
            token_ZN,
            rows_ZV.stride(0),
            SIZE=vocab_size,
            BLOCK=BLOCK_TOKENS,
            num_warps=BLOCK_WARPS,
        )
        _best_of_row_kernel[(num_rows,)](
            key_ZN,
            token_ZN,
            best_Z,
            token_Z,
            NUM_BLOCKS=num_blocks,
            BLOCKS=ceil_power(num_blocks),
            num_warps=1,
        )
    return best_Z, token_Z


@triton.jit
def _best_of_block_kernel(rows, keys, tokens, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The key of the largest element of one block of one row, and its first token."""
    NUM_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // NUM_BLOCKS).to(tl.int64)
    token_B = program % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    value_B = tl.load(rows + row * row_stride + token_B, mask=token_B < SIZE, other=-float("inf"))
    key_B = _keys(value_B)
    best = tl.max(key_B, axis=0)
    # Tokens beyond the row are as small as any other, and later.
    token = tl.min(tl.where(key_B == best, token_B, 0x7FFFFFFF), axis=0)
    tl.store(keys + program, best)
    tl.store(tokens + program, token)


@triton.jit
def _best_of_row_kernel(
    keys, tokens, best_out, token_out, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr
):
    """The largest of a row's blocks; of equal ones the first."""
    row = tl.program_id(0).to(tl.int64)
    block_N = tl.arange(0, BLOCKS)
    is_block_N = block_N < NUM_BLOCKS
    at_N = row * NUM_BLOCKS + block_N
    # Less than the key of minus infinity.
    key_N = tl.load(keys + at_N, mask=is_block_N, other=-0x7FFFFFFF)
    token_N = tl.load(tokens + at_N, mask=is_block_N, other=0x7FFFFFFF)
    best = tl.max(key_N, axis=0)
    token = tl.min(tl.where(key_N == best, token_N, 0x7FFFFFFF), axis=0)
    bits = tl.where(best < 0, best ^ 0x7FFFFFFF, best)
    tl.store(best_out + row, bits.to(tl.float32, bitcast=True))
    tl.store(token_out + row, token.to(tl.int64))


@triton.jit
def _keys(value_B):
    """int32 in the order of float32 values: the zeros alike, NaN (whose bits these are) last."""
    bits_B = value_B.to(tl.int32, bitcast=True)
    key_B = tl.where(bits_B < 0, bits_B ^ 0x7FFFFFFF, bits_B)
    key_B = tl.where(value_B == 0.0, 0, key_B)
    return tl.where(value_B != value_B, 0x7FFFFFFF, key_B)
