"""What attention in decode and in prefill share: a call's tensors, gathered keys, running softmax.

Knows no grid: which rows and which keys a program has, its kernel says. Called by kernels/triton/
attention_decode and attention_prefill.
Legend: see kernels/__init__; R rows of a block (tokens x the query heads of one kv head), N keys of
a block; E is the head size, in kernels padded to a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels import AttentionWork
from loraswarm.kernels.triton.launch import IS_INTERPRETED, ceil_power

LOG2_E = 1.4426950408889634
NO_WINDOW = 1 << 30
"""A window that hides no key: longer than any context, and far from where int32 ends."""
MAX_HEAD_SIZE = 256
MIN_PRODUCT = 16
"""Least rows, columns and summands of a product of blocks."""
KEY_BYTES = 1 << 14
"""Bytes of a block's keys: with its values, in several stages, they must fit shared memory."""
NUM_STAGES = 5
"""Keys are loaded two blocks ahead: a block's page ids must come before its keys, and the stages
are divided between the two. With 3, one ahead, nothing is computed between a load and its use."""
WIDENS_PRODUCTS = tl.constexpr(IS_INTERPRETED)
"""The interpreter multiplies the bits of bfloat16 as integers, so it is given float32."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `paged_attention` on one layer.

    Shapes    q, out [T, H, E], out contiguous; kv [P, 2, K, C, E], a view of the pages.
    Units     a window in tokens, NO_WINDOW for none.
    """

    q_THE: Tensor
    kv: Tensor
    out_THE: Tensor
    work: AttentionWork
    scale: float
    window: int

    @property
    def num_sequences(self) -> int:
        return self.work.context_lens.numel()

    @property
    def num_kv_heads(self) -> int:
        return self.kv.shape[2]

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.q_THE.shape[1] // self.num_kv_heads

    def arguments(self) -> tuple[Any, ...]:
        """The first parameters of both kernels, `q` to `token_stride`."""
        work = self.work
        page_stride, value_stride, head_stride, token_stride, _ = self.kv.stride()
        return (
            self.q_THE,
            self.kv,
            self.out_THE,
            work.query_starts,
            work.context_lens,
            work.page_table,
            work.page_table.shape[1],
            self.window,
            self.scale * LOG2_E,
            self.q_THE.stride(0),
            self.q_THE.stride(1),
            page_stride,
            value_stride,
            head_stride,
            token_stride,
        )

    def constants(self, max_keys: int) -> dict[str, int]:
        """What is fixed for a model: kernels are compiled for it."""
        head_size = self.q_THE.shape[2]
        return {
            "NUM_KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "HEAD_SIZE": head_size,
            "PAGE_TOKENS": self.kv.shape[3],
            "BLOCK_KEYS": block_keys(head_size, self.kv.itemsize, max_keys),
            "BLOCK_SIZE": padded_size(head_size),
        }


def padded_size(head_size: int) -> int:
    """Columns of a block that holds heads of this size."""
    return max(MIN_PRODUCT, ceil_power(head_size))


def block_keys(head_size: int, element_bytes: int, max_keys: int) -> int:
    """Keys of a block: a power of two, 16 to `max_keys`.

    float32 is not multiplied by tensor cores: few keys, so that products fit registers.
    """
    if element_bytes == 4:
        return MIN_PRODUCT
    keys = KEY_BYTES // (padded_size(head_size) * element_bytes)
    return min(max_keys, max(MIN_PRODUCT, keys))


def num_warps(block_rows: int) -> int:
    """Warps of a program: with so many, what it holds of its rows fits registers."""
    return 8 if block_rows > 64 else 4


@triton.jit
def keys_and_values(
    kv,
    page_row,
    key_N,
    is_key_N,
    page_stride,
    value_stride,
    token_stride,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """k, v [N, E] of a sequence's tokens `key_N` from its pages; zeros where they are not wanted.

    `kv` points to the kv head's first row in page 0, `page_row` to the sequence's page ids.
    """
    page_N = tl.load(page_row + key_N // PAGE_TOKENS, mask=is_key_N, other=0)
    offset_N = page_N.to(tl.int64) * page_stride + key_N % PAGE_TOKENS * token_stride
    column_E = tl.arange(0, BLOCK_SIZE)
    at_NE = kv + offset_N[:, None] + column_E[None, :]
    is_wanted_NE = is_key_N[:, None] & (column_E < HEAD_SIZE)[None, :]
    k_NE = tl.load(at_NE, mask=is_wanted_NE, other=0.0)
    v_NE = tl.load(at_NE + value_stride, mask=is_wanted_NE, other=0.0)
    return k_NE, v_NE


@triton.jit
def scores_of(q_RE, k_NE, scale):
    """scale * q . k [R, N] in float32."""
    zero_RN = tl.zeros([q_RE.shape[0], k_NE.shape[0]], tl.float32)
    return add_product(q_RE, tl.trans(k_NE), zero_RN) * scale


@triton.jit
def add_values(score_RN, v_NE, top_R, sum_R, out_RE, MAY_SEE_NONE: tl.constexpr):
    """Take a block of keys into the running softmax of each row.

    Semantics, over the keys so far, scores being logarithms to the base 2 and -inf where hidden:
        top = max(score); sum = sum(2 ** (score - top)); out = sum(2 ** (score - top) * v)
    `MAY_SEE_NONE`: a row may not have seen any key yet; its top is -inf and its sum 0.
    """
    new_top_R = tl.maximum(top_R, tl.max(score_RN, 1))
    base_R = new_top_R
    if MAY_SEE_NONE:
        base_R = tl.where(new_top_R == float("-inf"), 0.0, new_top_R)
    weight_RN = tl.exp2(score_RN - base_R[:, None])
    decay_R = tl.exp2(top_R - base_R)
    sum_R = sum_R * decay_R + tl.sum(weight_RN, 1)
    out_RE = add_weighted(weight_RN, v_NE, out_RE * decay_R[:, None])
    return new_top_R, sum_R, out_RE


@triton.jit
def add_weighted(weight_RN, v_NE, out_RE):
    """out + weight @ v, of float32 weights.

    Values of two bytes are multiplied by the weights as a sum of two terms of their type: 16 bits
    of a weight at least, by two products at the full rate of tensor cores. Widened to tf32, v would
    cost the same, keep 11 bits, and have to be transposed in shared memory.
    """
    if v_NE.dtype == tl.float32:
        out_RE = add_product(weight_RN, v_NE, out_RE)
    else:
        high_RN = weight_RN.to(v_NE.dtype)
        low_RN = (weight_RN - high_RN.to(tl.float32)).to(v_NE.dtype)
        out_RE = add_product(high_RN, v_NE, out_RE)
        out_RE = add_product(low_RN, v_NE, out_RE)
    return out_RE


@triton.jit
def add_product(a, b, sums):
    """sums + a @ b, summed in float32."""
    if WIDENS_PRODUCTS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")
