"""Rotates the heads of q and k by their positions and stores k and v in their pages.

Heads may be normalised first. Every product and sum is rounded to the element type, as if each were
a tensor operation of its own. A program is some heads of a token. Called through kernels/triton.
Legend: T tokens, H query heads, K kv heads, E head size, N heads of a program, F half of a head's
columns.

    a token of qkv    | q head 0 | ... | q head H-1 | k head 0 | ... | v head 0 | ... |
    heads             | 0          ...       H - 1  | H          ...     H + K    ... | H + 2 K
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels import HeadNorms
from loraswarm.kernels.arguments import check_rotate, require
from loraswarm.kernels.reference import check_write_kv
from loraswarm.kernels.triton.launch import ceil_power, check_device, on_device
from loraswarm.kernels.triton.norm import inverse_rms
from loraswarm.kernels.triton.rows import check_elements

PART_ELEMENTS = 1 << 10
WARP_ELEMENTS = 256
"""8 elements a thread: 16 bytes of the 16-bit types, the most that one load brings."""


def heads_of_program(num_heads: int, num_columns: int) -> int:
    """Heads of a program, a power of two, of which each takes `num_columns`, another."""
    return min(ceil_power(num_heads), max(1, PART_ELEMENTS // num_columns))


def write_kv_(pages: Tensor, layer: int, k_TKE: Tensor, v_TKE: Tensor, slots_T: Tensor) -> None:
    """See `kernels.reference.write_kv_`; the values of `slots_T` are not looked at.

    A token with a negative slot is not stored. That slots are within the pages is up to the caller.
    """
    check_write_kv(pages, k_TKE, v_TKE, slots_T)
    _check_places(pages, layer, slots_T)
    check_device(pages=pages, k_TKE=k_TKE, v_TKE=v_TKE, slots_T=slots_T)
    num_tokens, num_kv_heads, size = k_TKE.shape
    if k_TKE.numel() == 0:
        return
    num_columns = ceil_power(size)
    num_heads = heads_of_program(num_kv_heads, num_columns)
    with on_device(pages):
        _write_kv_kernel[(num_tokens * -(-num_kv_heads // num_heads),)](
            k_TKE,
            v_TKE,
            pages,
            slots_T,
            layer,
            *k_TKE.stride(),
            *v_TKE.stride(),
            *pages.stride()[:5],
            NUM_KV_HEADS=num_kv_heads,
            SIZE=size,
            PAGE_TOKENS=pages.shape[4],
            HEADS=num_heads,
            COLUMNS=num_columns,
            num_warps=max(1, num_heads * num_columns // WARP_ELEMENTS),
        )


def rotate_and_write_kv_(
    qkv_TNE: Tensor,
    num_heads: int,
    cos_T1E: Tensor,
    sin_T1E: Tensor,
    pages: Tensor,
    layer: int,
    slots_T: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """See `kernels.reference.rotate_and_write_kv_`; slots as in `write_kv_`."""
    check_rotate(qkv_TNE, num_heads, (cos_T1E, sin_T1E), pages, slots_T, norms)
    _check_places(pages, layer, slots_T)
    q_weight_E = norms.q_weight_E if norms is not None else None
    k_weight_E = norms.k_weight_E if norms is not None else None
    check_device(
        qkv_TNE=qkv_TNE,
        cos_T1E=cos_T1E,
        sin_T1E=sin_T1E,
        pages=pages,
        slots_T=slots_T,
        q_weight_E=q_weight_E,
        k_weight_E=k_weight_E,
    )
    num_tokens, num_all_heads, size = qkv_TNE.shape
    if qkv_TNE.numel() == 0:
        return
    num_columns = ceil_power(size // 2)
    num_part_heads = heads_of_program(num_all_heads, num_columns)
    with on_device(qkv_TNE):
        _rotate_and_write_kv_kernel[(num_tokens * -(-num_all_heads // num_part_heads),)](
            qkv_TNE,
            cos_T1E,
            sin_T1E,
            q_weight_E,
            k_weight_E,
            pages,
            slots_T,
            layer,
            norms.eps if norms is not None else 0.0,
            *pages.stride()[:5],
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=pages.shape[3],
            SIZE=size,
            PAGE_TOKENS=pages.shape[4],
            HEADS=num_part_heads,
            COLUMNS=num_columns,
            num_warps=max(1, num_part_heads * num_columns // WARP_ELEMENTS),
            # A fused multiply-add would leave out the rounding of a float32 product.
            enable_fp_fusion=False,
        )


def _check_places(pages: Tensor, layer: int, slots_T: Tensor) -> None:
    check_elements("pages", pages)
    require(pages.stride(5) == 1, f"pages has strides {pages.stride()}; its last one must be 1")
    require(0 <= layer < pages.shape[1], f"layer is {layer}; pages have {pages.shape[1]} layers")
    require(slots_T.is_contiguous(), "slots_T must be contiguous")


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["slots"])
def _write_kv_kernel(
    k,
    v,
    pages,
    slots,
    layer,
    k_token_stride,
    k_head_stride,
    k_stride,
    v_token_stride,
    v_head_stride,
    v_stride,
    page_stride,
    layer_stride,
    value_stride,
    head_stride,
    row_stride,
    NUM_KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some heads of k and of v of one token."""
    NUM_PARTS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // NUM_PARTS).to(tl.int64)
    head_N = (tl.program_id(0) % NUM_PARTS * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column_1E = tl.arange(0, COLUMNS)[None, :]
    slot = tl.load(slots + token)
    is_kept_NE = (head_N < NUM_KV_HEADS)[:, None] & (column_1E < SIZE) & (slot >= 0)
    k_at_N1 = k + token * k_token_stride + (head_N * k_head_stride)[:, None]
    v_at_N1 = v + token * v_token_stride + (head_N * v_head_stride)[:, None]
    k_NE = tl.load(k_at_N1 + column_1E * k_stride, mask=is_kept_NE)
    v_NE = tl.load(v_at_N1 + column_1E * v_stride, mask=is_kept_NE)
    at = slot // PAGE_TOKENS * page_stride + slot % PAGE_TOKENS * row_stride
    at += layer.to(tl.int64) * layer_stride
    target_NE = pages + at + (head_N * head_stride)[:, None] + column_1E
    tl.store(target_NE, k_NE, mask=is_kept_NE)
    tl.store(target_NE + value_stride, v_NE, mask=is_kept_NE)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["slots"])
def _rotate_and_write_kv_kernel(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    pages,
    slots,
    layer,
    eps,
    page_stride,
    layer_stride,
    value_stride,
    head_stride,
    row_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some heads of one token: q in place, k and v to its slot; without norms weights are None."""
    NUM_ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    NUM_PARTS: tl.constexpr = (NUM_ALL_HEADS + HEADS - 1) // HEADS
    HALF: tl.constexpr = SIZE // 2
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    token = (tl.program_id(0) // NUM_PARTS).to(tl.int64)
    head_N = tl.program_id(0) % NUM_PARTS * HEADS + tl.arange(0, HEADS)
    column_1F = tl.arange(0, COLUMNS)[None, :]
    is_inside_NF = (head_N < NUM_ALL_HEADS)[:, None] & (column_1F < HALF)
    slot = tl.load(slots + token)

    source_NF = qkv + token * (NUM_ALL_HEADS * SIZE) + (head_N * SIZE)[:, None] + column_1F
    stored_low_NF = tl.load(source_NF, mask=is_inside_NF, other=0.0)
    stored_high_NF = tl.load(source_NF + HALF, mask=is_inside_NF, other=0.0)
    cos_low_1F, cos_high_1F = _halves(cos + token * SIZE, column_1F, HALF)
    sin_low_1F, sin_high_1F = _halves(sin + token * SIZE, column_1F, HALF)

    low_NF, high_NF = stored_low_NF.to(tl.float32), stored_high_NF.to(tl.float32)
    if q_weight is not None:
        q_low_1F, q_high_1F = _halves(q_weight, column_1F, HALF)
        k_low_1F, k_high_1F = _halves(k_weight, column_1F, HALF)
        squares_N = tl.sum(low_NF * low_NF + high_NF * high_NF, axis=1)
        inverse_N1 = inverse_rms(squares_N, eps, SIZE)[:, None]
        is_q_N1 = (head_N < NUM_HEADS)[:, None]
        low_NF = _product(low_NF, inverse_N1, DTYPE)
        high_NF = _product(high_NF, inverse_N1, DTYPE)
        low_NF = _product(low_NF, tl.where(is_q_N1, q_low_1F, k_low_1F), DTYPE)
        high_NF = _product(high_NF, tl.where(is_q_N1, q_high_1F, k_high_1F), DTYPE)
    new_low_NF = _product(low_NF, cos_low_1F, DTYPE) + _product(high_NF, sin_low_1F, DTYPE)
    new_high_NF = _product(high_NF, cos_high_1F, DTYPE) + _product(low_NF, sin_high_1F, DTYPE)

    # A thread of another warp may hold a copy of an element, and must have read it.
    tl.debug_barrier()
    is_q_NF = is_inside_NF & (head_N < NUM_HEADS)[:, None]
    tl.store(source_NF, new_low_NF.to(DTYPE), mask=is_q_NF)
    tl.store(source_NF + HALF, new_high_NF.to(DTYPE), mask=is_q_NF)

    kv_head_N = (head_N - NUM_HEADS).to(tl.int64)
    is_v_N = kv_head_N >= NUM_KV_HEADS
    v_at_N = value_stride + (kv_head_N - NUM_KV_HEADS) * head_stride
    at_N = tl.where(is_v_N, v_at_N, kv_head_N * head_stride)
    at = slot // PAGE_TOKENS * page_stride + slot % PAGE_TOKENS * row_stride
    at += layer.to(tl.int64) * layer_stride
    target_NF = pages + at + at_N[:, None] + column_1F
    is_kept_NF = is_inside_NF & (kv_head_N >= 0)[:, None] & (slot >= 0)
    kept_low_NF = tl.where(is_v_N[:, None], stored_low_NF, new_low_NF.to(DTYPE))
    kept_high_NF = tl.where(is_v_N[:, None], stored_high_NF, new_high_NF.to(DTYPE))
    tl.store(target_NF, kept_low_NF, mask=is_kept_NF)
    tl.store(target_NF + HALF, kept_high_NF, mask=is_kept_NF)


@triton.jit
def _halves(row, column_1F, HALF: tl.constexpr):
    """Both halves of a row of 2 HALF columns, as float32."""
    low_1F = tl.load(row + column_1F, mask=column_1F < HALF, other=0.0)
    high_1F = tl.load(row + HALF + column_1F, mask=column_1F < HALF, other=0.0)
    return low_1F.to(tl.float32), high_1F.to(tl.float32)


@triton.jit
def _product(first_NF, second_NF, DTYPE: tl.constexpr):
    """first * second, rounded to the dtype."""
    return (first_NF * second_NF).to(DTYPE).to(tl.float32)
