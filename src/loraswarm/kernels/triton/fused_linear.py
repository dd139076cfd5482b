"""A product with the base's weight and the low-rank updates on top of it, in one kernel.

For prefill: y is written once, and neither read again nor rounded in between. Nothing calls it but
its tests and benchmarks/gpu, which measures it against torch's product with `lora_expand_` after it
(docs/cuda.md). Two-byte types, whose products the tensor cores do.
Legend: T tokens, N columns of y, I in features, K of them at a time, O out features, R ranks of a
tile, Q parts.

    a program   | x W^T over all K |  + h Bt of each tile of each item that has some of its tokens
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, TileTable
from loraswarm.kernels.arguments import require
from loraswarm.kernels.reference import check_expand, check_sites
from loraswarm.kernels.triton import items, words
from loraswarm.kernels.triton.expand import add_product, bounds_on, floats_of, vector_of
from loraswarm.kernels.triton.launch import IS_INTERPRETED, check_device, on_device
from loraswarm.kernels.triton.linear import RowWeight
from loraswarm.kernels.triton.plan import plans

BLOCK_TOKENS, BLOCK_COLUMNS, BLOCK_FEATURES = 128, 128, 64
GROUP_BLOCKS = 8
"""Blocks of tokens whose programs follow each other: they read the same columns of the weight while
the second-level cache has them."""
NUM_WARPS, NUM_STAGES = 8, 3

ITEM_WORDS, TILE_WORDS = tl.constexpr(items.ITEM_WORDS), tl.constexpr(words.TILE_WORDS)
FIRST_TOKEN, NUM_TOKENS = tl.constexpr(items.FIRST_TOKEN), tl.constexpr(items.NUM_TOKENS)
FIRST_TILE, NUM_TILES = tl.constexpr(items.FIRST_TILE), tl.constexpr(items.NUM_TILES)
GAIN, GAIN_WORDS = tl.constexpr(items.GAIN), tl.constexpr(words.GAIN_WORDS)
BT_OFFSET, BT_STRIDE = tl.constexpr(words.BT_OFFSET), tl.constexpr(words.BT_STRIDE)
U_OFFSET, V_OFFSET = tl.constexpr(words.U_OFFSET), tl.constexpr(words.V_OFFSET)
RANKS, SCALE = tl.constexpr(words.RANKS), tl.constexpr(words.SCALE)
TILE_RANKS = tl.constexpr(MAX_TILE_RANKS)
WIDENS_PRODUCTS = tl.constexpr(IS_INTERPRETED)
"""The interpreter multiplies the bits of bfloat16 as integers, so it is given float32."""


class Updates(NamedTuple):
    """The arguments of `reference.lora_expand_` but for y."""

    h_QTR: Tensor
    pool: Tensor
    tiles: TileTable
    first_site: int
    out_bounds: tuple[int, ...]


def fused_linear(x_TI: Tensor, weight: RowWeight, updates: Updates) -> Tensor:
    """`reference.linear` without bias, then `reference.lora_expand_` on what it returns.

    Shapes    x [T, I] bf16|f16, contiguous; weight [O, I]; returns [T, O].
    Numerics  everything in float32, one rounding at the end: not that of the product before the
              update, so rows without tiles are as accurate as torch's, and not always the same
              bits.
    Raises    ValueError naming the argument.
    """
    weight_OI = weight.weight_OI
    h_QTR, pool, tiles, first_site, out_bounds = updates
    y_TO = _result(x_TI, weight_OI)
    check_expand(y_TO, h_QTR, pool, tiles, out_bounds)
    check_sites(tiles, first_site, len(out_bounds) - 1)
    check_device(x_TI=x_TI, weight=weight_OI, h_QTR=h_QTR, pool=pool)
    plan = plans.of(tiles, x_TI.device)
    num_tokens, in_features = x_TI.shape
    require(plan.table.num_tokens <= num_tokens, "x_TI has fewer rows than tiles.segments")
    plan.expand_items(first_site, out_bounds, h_QTR.shape[2], pool)
    if y_TO.numel() == 0:
        return y_TO
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    widths = [high - low for low, high in pairwise(out_bounds)]
    num_pieces = num_blocks * sum(-(-width // BLOCK_COLUMNS) for width in widths)
    traits = plan.expand_traits(first_site, len(widths))
    with on_device(x_TI):
        fused_linear_kernel[(num_pieces,)](
            x_TI,
            weight_OI,
            y_TO,
            h_QTR,
            pool,
            floats_of(pool),
            plan.words.expand_starts,
            plan.words.expand_items,
            plan.words.tiles,
            plan.words.scales,
            plan.words.gains,
            bounds_on(x_TI.device, out_bounds),
            first_site,
            num_tokens,
            h_QTR.shape[2] // MAX_TILE_RANKS,
            IN_FEATURES=in_features,
            OUT_FEATURES=y_TO.shape[1],
            BLOCK_T=BLOCK_TOKENS,
            BLOCK_N=BLOCK_COLUMNS,
            BLOCK_K=BLOCK_FEATURES,
            GROUP=GROUP_BLOCKS,
            VECTOR=vector_of(y_TO, traits, out_bounds),
            HAS_V=traits.has_v,
            PRECISION="tf32x3" if x_TI.dtype == torch.float16 else "ieee",
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return y_TO


def _result(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """y [T, O], not written yet, if x and the weight are as they must be."""
    is_rows = x_TI.dim() == 2 and x_TI.is_contiguous() and x_TI.shape[1] == weight_OI.shape[1]
    require(
        is_rows, f"x_TI is {tuple(x_TI.shape)}; it must be contiguous, [T, {weight_OI.shape[1]}]"
    )
    require(
        x_TI.dtype in (torch.bfloat16, torch.float16) and weight_OI.dtype == x_TI.dtype,
        f"x_TI is {x_TI.dtype}, the weight {weight_OI.dtype}; both must be bfloat16 or float16",
    )
    require(weight_OI.is_contiguous(), "the weight must be contiguous, [O, I]")
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])


@triton.jit(do_not_specialize=["first_site", "num_rows", "most_tiles"])
def fused_linear_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    pool_ptr,
    float_ptr,
    start_ptr,
    item_ptr,
    tile_ptr,
    scale_ptr,
    gain_ptr,
    bound_ptr,
    first_site,
    num_rows,
    most_tiles,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of tokens and of the columns of one part; parts follow each other.

    `VECTOR` divides where rows of Bt and parts of y begin.
    """
    piece = tl.program_id(0)
    num_token_blocks = (num_rows + BLOCK_T - 1) // BLOCK_T
    part = 0
    low = tl.multiple_of(tl.load(bound_ptr), VECTOR)
    width = tl.multiple_of(tl.load(bound_ptr + 1) - low, VECTOR)
    num_pieces = num_token_blocks * ((width + BLOCK_N - 1) // BLOCK_N)
    while piece >= num_pieces:
        piece -= num_pieces
        part += 1
        low = tl.multiple_of(tl.load(bound_ptr + part), VECTOR)
        width = tl.multiple_of(tl.load(bound_ptr + part + 1) - low, VECTOR)
        num_pieces = num_token_blocks * ((width + BLOCK_N - 1) // BLOCK_N)
    num_column_blocks = (width + BLOCK_N - 1) // BLOCK_N
    group = piece // (GROUP * num_column_blocks)
    group_size = tl.minimum(num_token_blocks - group * GROUP, GROUP)
    place = piece % (GROUP * num_column_blocks)
    token_block = group * GROUP + place % group_size
    row_T = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row_T = row_T < num_rows
    column_N = place // group_size * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column_N = column_N < width

    feature_K = tl.arange(0, BLOCK_K)
    x_at_TK = x_ptr + (row_T.to(tl.int64) * IN_FEATURES)[:, None] + feature_K[None, :]
    weight_at_N = weight_ptr + (low + column_N).to(tl.int64) * IN_FEATURES
    weight_at_KN = weight_at_N[None, :] + feature_K[:, None]
    sum_TN = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for first in range(0, IN_FEATURES, BLOCK_K):
        is_feature_K = feature_K < IN_FEATURES - first
        x_TK = tl.load(x_at_TK, mask=is_row_T[:, None] & is_feature_K[None, :], other=0.0)
        weight_KN = tl.load(
            weight_at_KN, mask=is_feature_K[:, None] & is_column_N[None, :], other=0.0
        )
        if WIDENS_PRODUCTS:
            x_TK = x_TK.to(tl.float32)
            weight_KN = weight_KN.to(tl.float32)
        sum_TN = tl.dot(x_TK, weight_KN, sum_TN, input_precision="ieee")
        x_at_TK += BLOCK_K
        weight_at_KN += BLOCK_K

    item = tl.load(start_ptr + first_site + part)
    end = tl.load(start_ptr + first_site + part + 1)
    while item < end:
        word_ptr = item_ptr + item.to(tl.int64) * ITEM_WORDS
        first_token = tl.load(word_ptr + FIRST_TOKEN)
        end_token = first_token + tl.load(word_ptr + NUM_TOKENS)
        is_near = (first_token < token_block * BLOCK_T + BLOCK_T) & (
            end_token > token_block * BLOCK_T
        )
        if is_near:
            is_item_T = (row_T >= first_token) & (row_T < end_token) & is_row_T
            item_TN = _add_tiles(
                sum_TN,
                h_ptr + (part * num_rows + row_T).to(tl.int64)[:, None] * (most_tiles * TILE_RANKS),
                pool_ptr,
                float_ptr,
                tile_ptr,
                scale_ptr,
                tl.load(word_ptr + FIRST_TILE),
                tl.load(word_ptr + NUM_TILES),
                is_item_T,
                column_N,
                is_column_N,
                VECTOR,
                HAS_V,
                PRECISION,
            )
            gain = tl.load(word_ptr + GAIN)
            if gain >= 0:
                g_at = tl.load(gain_ptr + gain * GAIN_WORDS)
                c_at = tl.load(gain_ptr + gain * GAIN_WORDS + 1)
                is_g_N, is_c_N = is_column_N & (g_at >= 0), is_column_N & (c_at >= 0)
                g_N = tl.load(float_ptr + g_at + column_N, mask=is_g_N, other=1.0)
                c_N = tl.load(float_ptr + c_at + column_N, mask=is_c_N, other=0.0)
                item_TN = g_N[None, :] * item_TN + c_N[None, :]
            # Other rows have been added zeros times what may not be numbers.
            sum_TN = tl.where(is_item_T[:, None], item_TN, sum_TN)
        item += 1
    y_at_TN = y_ptr + (row_T.to(tl.int64) * OUT_FEATURES + low)[:, None] + column_N[None, :]
    tl.store(
        y_at_TN, sum_TN.to(y_ptr.dtype.element_ty), mask=is_row_T[:, None] & is_column_N[None, :]
    )


@triton.jit
def _add_tiles(
    sum_TN,
    h_at_T1,
    pool_ptr,
    float_ptr,
    tile_ptr,
    scale_ptr,
    first_tile,
    num_tiles,
    is_item_T,
    column_N,
    is_column_N,
    VECTOR: tl.constexpr,
    HAS_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum + v * ((scale * u * h) Bt) of an item's tiles, in its rows; others get anything."""
    rank_R = tl.arange(0, TILE_RANKS)
    tile = 0
    while tile < num_tiles:
        word = (first_tile + tile).to(tl.int64) * TILE_WORDS
        offset = tl.load(tile_ptr + word + BT_OFFSET)
        stride = tl.load(tile_ptr + word + BT_STRIDE)
        is_rank_R = rank_R < tl.load(tile_ptr + word + RANKS)
        u_at = tl.load(tile_ptr + word + U_OFFSET)
        # The scale is a float32 in the lower half of its word.
        scale = tl.load(scale_ptr + 2 * (word + SCALE))
        u_R = tl.load(float_ptr + u_at + rank_R, mask=is_rank_R & (u_at >= 0), other=1.0)
        bt_at_R = tl.multiple_of(offset + rank_R * stride, VECTOR)
        bt_RN = tl.load(
            pool_ptr + (bt_at_R[:, None] + column_N[None, :]),
            mask=is_rank_R[:, None] & is_column_N[None, :],
            other=0.0,
        )
        is_h_TR = is_item_T[:, None] & is_rank_R[None, :]
        h_TR = tl.load(h_at_T1 + (tile * TILE_RANKS + rank_R)[None, :], mask=is_h_TR, other=0.0)
        h_TR = h_TR * (scale * u_R)[None, :]
        if HAS_V:
            v_at = tl.load(tile_ptr + word + V_OFFSET)
            v_N = tl.load(float_ptr + v_at + column_N, mask=is_column_N & (v_at >= 0), other=1.0)
            zero_TN = tl.zeros([is_item_T.shape[0], column_N.shape[0]], tl.float32)
            sum_TN += v_N[None, :] * add_product(zero_TN, h_TR, bt_RN, PRECISION)
        else:
            sum_TN = add_product(sum_TN, h_TR, bt_RN, PRECISION)
        tile += 1
    return sum_TN
