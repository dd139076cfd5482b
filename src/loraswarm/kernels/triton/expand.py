"""y = g * (y + sum of v * ((scale * u * h) Bt)) + c: each block of y is read and written once.

Programs take pieces of work from the plan's list of items: all tiles and gains of a segment at one
site, for its tokens and some columns of y. Called by lora; fused_linear uses parts of it.
Legend: T tokens, N columns of y, R ranks of some tiles, Q parts of a fused linear.

    products with h, a float32, keep its accuracy:
    bfloat16   h is the sum of three bfloat16, cut off, so that all products are exact
    float16    Bt is exact in tf32, h is the sum of two and what is left is below 2 ** -21 of it
    float32    products of float32
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.triton import items, words
from loraswarm.kernels.triton.items import DECODE, Cut
from loraswarm.kernels.triton.launch import IS_INTERPRETED, ceil_power, num_cores, on_device
from loraswarm.kernels.triton.plan import DevicePlan, Traits

MIN_BLOCK = 16
DECODE_TILES, DECODE_COLUMNS = 4, 128
"""Most tiles at a time, and columns: what four programs a core have registers for."""
PREFILL_TILES, PREFILL_COLUMNS = 2, 64
PROGRAMS_PER_CORE = 4
VECTOR_BYTES = 16
WHOLE_VECTOR = 8
"""Elements of 16 bits in a load of that many bytes."""

ITEM_WORDS, TILE_WORDS = tl.constexpr(items.ITEM_WORDS), tl.constexpr(words.TILE_WORDS)
FIRST_TOKEN, NUM_TOKENS = tl.constexpr(items.FIRST_TOKEN), tl.constexpr(items.NUM_TOKENS)
FIRST_TILE, NUM_TILES = tl.constexpr(items.FIRST_TILE), tl.constexpr(items.NUM_TILES)
GAIN, GAIN_WORDS = tl.constexpr(items.GAIN), tl.constexpr(words.GAIN_WORDS)
BT_OFFSET, BT_STRIDE = tl.constexpr(words.BT_OFFSET), tl.constexpr(words.BT_STRIDE)
U_OFFSET, V_OFFSET = tl.constexpr(words.U_OFFSET), tl.constexpr(words.V_OFFSET)
RANKS, SCALE = tl.constexpr(words.RANKS), tl.constexpr(words.SCALE)
TILE_RANKS = tl.constexpr(MAX_TILE_RANKS)
HIGH_BITS = tl.constexpr(-(1 << 16))
"""Of a float32, those that a bfloat16 has."""
WIDENS_PRODUCTS = tl.constexpr(IS_INTERPRETED)
"""The interpreter multiplies the bits of bfloat16 as integers, so it is given float32."""


class ExpandBlocks(NamedTuple):
    """Sizes of a piece of work, powers of two."""

    block_tokens: int
    block_ranks: int
    block_columns: int


def expand_blocks(
    widest_part: int, cut: Cut, most_tiles: int, has_v: bool, vector: int
) -> ExpandBlocks:
    """Tiles with a v each are taken one by one, else several at a time.

    For fewer tiles than a batch has at most, the further ranks add zeros: bits stay the same.
    Loads of less than `WHOLE_VECTOR` elements take more registers, so there are fewer columns.
    """
    most_grouped, columns = PREFILL_TILES, PREFILL_COLUMNS
    if cut == DECODE:
        most_grouped, columns = DECODE_TILES, DECODE_COLUMNS
    grouped = 1 if has_v else min(ceil_power(max(most_tiles, 1)), most_grouped)
    if vector < WHOLE_VECTOR:
        columns //= 2
    columns = min(columns, max(ceil_power(max(widest_part, 1)), MIN_BLOCK))
    return ExpandBlocks(cut.item_tokens, MAX_TILE_RANKS * grouped, columns)


def launch_expand(
    y_TO: Tensor,
    h_QTR: Tensor,
    pool: Tensor,
    plan: DevicePlan,
    first_site: int,
    out_bounds: tuple[int, ...],
    num_items: int | None,
) -> None:
    """Update y. Everything is checked; y is not empty. `num_items` is None if unknown here."""
    num_parts, num_tokens, num_columns = h_QTR.shape
    widest = max(high - low for low, high in pairwise(out_bounds))
    traits = plan.expand_traits(first_site, num_parts)
    most_tiles = num_columns // MAX_TILE_RANKS
    vector = vector_of(y_TO, traits, out_bounds)
    blocks = expand_blocks(widest, plan.table.cut, most_tiles, traits.has_v, vector)
    num_programs = PROGRAMS_PER_CORE * num_cores(y_TO.device)
    if num_items is not None:
        num_programs = min(num_programs, num_items * -(-widest // blocks.block_columns))
    with on_device(y_TO):
        expand_kernel[(num_programs,)](
            y_TO,
            h_QTR,
            pool,
            floats_of(pool),
            plan.words.expand_starts,
            plan.words.expand_items,
            plan.words.tiles,
            plan.words.scales,
            plan.words.gains,
            bounds_on(y_TO.device, out_bounds),
            y_TO.stride(0),
            first_site,
            num_parts,
            num_tokens,
            most_tiles,
            BLOCK_T=blocks.block_tokens,
            BLOCK_R=blocks.block_ranks,
            BLOCK_N=blocks.block_columns,
            VECTOR=vector,
            HAS_V=traits.has_v,
            PRECISION="tf32x3" if y_TO.dtype == torch.float16 else "ieee",
            num_warps=4,
            num_stages=1,
        )


def vector_of(y_TO: Tensor, traits: Traits, out_bounds: tuple[int, ...]) -> int:
    """Elements of a whole load, if rows of Bt and parts of y begin at multiples of it, else 1."""
    vector = VECTOR_BYTES // y_TO.element_size()
    is_aligned = traits.alignment >= vector and all(bound % vector == 0 for bound in out_bounds)
    return vector if is_aligned else 1


def floats_of(pool: Tensor) -> Tensor:
    """The pool as float32, without a last element that is half of one."""
    per_float = 4 // pool.element_size()
    return pool[: pool.numel() // per_float * per_float].view(torch.float32)


@cache
def bounds_on(device: torch.device, out_bounds: tuple[int, ...]) -> Tensor:
    """[Q + 1] int32 on a device, kept: copied before a graph that uses it is captured."""
    with torch.inference_mode():
        return torch.tensor(out_bounds, dtype=torch.int32).to(device)


@triton.jit(do_not_specialize=["first_site", "num_parts", "num_rows", "most_tiles"])
def expand_kernel(
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
    y_stride,
    first_site,
    num_parts,
    num_rows,
    most_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Updates y [rows, O] by h [Q, rows, 16 most_tiles] at `num_parts` sites.

    `VECTOR` divides where rows of Bt and parts of y begin. With `HAS_V` a block of ranks is one
    tile's. Pieces are numbered through all parts; none is written beyond y, whatever items say.
    """
    piece = tl.program_id(0)
    part = 0
    while part < num_parts:
        low = tl.multiple_of(tl.load(bound_ptr + part), VECTOR)
        width = tl.multiple_of(tl.load(bound_ptr + part + 1) - low, VECTOR)
        first_item = tl.load(start_ptr + first_site + part)
        num_items = tl.load(start_ptr + first_site + part + 1) - first_item
        num_blocks = (width + BLOCK_N - 1) // BLOCK_N
        num_pieces = num_items * num_blocks
        while piece < num_pieces:
            item = first_item + piece // num_blocks
            word_ptr = item_ptr + item.to(tl.int64) * ITEM_WORDS
            first_token = tl.load(word_ptr + FIRST_TOKEN)
            num_tokens = tl.load(word_ptr + NUM_TOKENS)
            first_tile = tl.load(word_ptr + FIRST_TILE)
            num_tiles = tl.load(word_ptr + NUM_TILES)
            gain = tl.load(word_ptr + GAIN)

            token_T = tl.arange(0, BLOCK_T)
            row_T = first_token + token_T
            is_token_T = (token_T < num_tokens) & (row_T < num_rows)
            column_N = piece % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
            is_column_N = column_N < width
            y_at_T = row_T.to(tl.int64) * y_stride + low
            y_at_TN = y_at_T[:, None] + column_N[None, :]
            is_y_TN = is_token_T[:, None] & is_column_N[None, :]
            y_TN = tl.load(y_ptr + y_at_TN, mask=is_y_TN, other=0.0)
            h_at_T = (part * num_rows + row_T).to(tl.int64) * (most_tiles * TILE_RANKS)

            delta_TN = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
            tile = 0
            while tile < num_tiles:
                rank_R = tl.arange(0, BLOCK_R)
                is_tile_R = tile + rank_R // TILE_RANKS < num_tiles
                words_at_R = (first_tile + tile + rank_R // TILE_RANKS).to(tl.int64) * TILE_WORDS
                words_R = tile_ptr + words_at_R
                offset_R = tl.load(words_R + BT_OFFSET, mask=is_tile_R, other=0)
                stride_R = tl.load(words_R + BT_STRIDE, mask=is_tile_R, other=0)
                ranks_R = tl.load(words_R + RANKS, mask=is_tile_R, other=0)
                u_at_R = tl.load(words_R + U_OFFSET, mask=is_tile_R, other=-1)
                # The scale is a float32 in the lower half of its word.
                scale_R = tl.load(scale_ptr + 2 * (words_at_R + SCALE), mask=is_tile_R, other=0.0)
                is_rank_R = is_tile_R & (rank_R % TILE_RANKS < ranks_R)
                u_R = tl.load(
                    float_ptr + u_at_R + rank_R % TILE_RANKS,
                    mask=is_rank_R & (u_at_R >= 0),
                    other=1.0,
                )
                bt_at_R = tl.multiple_of(offset_R + rank_R % TILE_RANKS * stride_R, VECTOR)
                bt_RN = tl.load(
                    pool_ptr + (bt_at_R[:, None] + column_N[None, :]),
                    mask=is_rank_R[:, None] & is_column_N[None, :],
                    other=0.0,
                )
                # Whole tiles are loaded: what has no rank is undefined, and left out afterwards.
                h_TR = tl.load(
                    h_ptr + (h_at_T[:, None] + (tile * TILE_RANKS + rank_R)[None, :]),
                    mask=is_token_T[:, None] & is_tile_R[None, :],
                    other=0.0,
                )
                h_TR = tl.where(is_rank_R[None, :], h_TR * (scale_R * u_R)[None, :], 0.0)
                if HAS_V:
                    v_at_ptr = tile_ptr + (first_tile + tile).to(tl.int64) * TILE_WORDS + V_OFFSET
                    v_at = tl.load(v_at_ptr)
                    v_N = tl.load(
                        float_ptr + v_at + column_N, mask=is_column_N & (v_at >= 0), other=1.0
                    )
                    zero_TN = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
                    delta_TN += v_N[None, :] * add_product(zero_TN, h_TR, bt_RN, PRECISION)
                else:
                    delta_TN = add_product(delta_TN, h_TR, bt_RN, PRECISION)
                tile += BLOCK_R // TILE_RANKS

            result_TN = y_TN.to(tl.float32) + delta_TN
            if gain >= 0:
                g_at = tl.load(gain_ptr + gain * GAIN_WORDS)
                c_at = tl.load(gain_ptr + gain * GAIN_WORDS + 1)
                is_g_N, is_c_N = is_column_N & (g_at >= 0), is_column_N & (c_at >= 0)
                g_N = tl.load(float_ptr + g_at + column_N, mask=is_g_N, other=1.0)
                c_N = tl.load(float_ptr + c_at + column_N, mask=is_c_N, other=0.0)
                result_TN = g_N[None, :] * result_TN + c_N[None, :]
            tl.store(y_ptr + y_at_TN, result_TN.to(y_TN.dtype), mask=is_y_TN)
            piece += tl.num_programs(0)
        piece -= num_pieces
        part += 1


@triton.jit
def add_product(sum_TN, h_TR, bt_RN, PRECISION: tl.constexpr):
    """sum + h Bt, with h as accurate as a float32."""
    if bt_RN.dtype == tl.bfloat16:
        high_TR = (h_TR.to(tl.int32, bitcast=True) & HIGH_BITS).to(tl.float32, bitcast=True)
        # Of infinity nothing is left, rather than the difference of two.
        rest_TR = tl.where(high_TR == h_TR, 0.0, h_TR - high_TR)
        middle_TR = (rest_TR.to(tl.int32, bitcast=True) & HIGH_BITS).to(tl.float32, bitcast=True)
        low_TR = rest_TR - middle_TR
        if WIDENS_PRODUCTS:
            bt_RN = bt_RN.to(tl.float32)
        else:
            high_TR = high_TR.to(tl.bfloat16)
            middle_TR = middle_TR.to(tl.bfloat16)
            low_TR = low_TR.to(tl.bfloat16)
        sum_TN = tl.dot(low_TR, bt_RN, sum_TN, input_precision=PRECISION)
        sum_TN = tl.dot(middle_TR, bt_RN, sum_TN, input_precision=PRECISION)
        sum_TN = tl.dot(high_TR, bt_RN, sum_TN, input_precision=PRECISION)
    else:
        sum_TN = tl.dot(h_TR, bt_RN.to(tl.float32), sum_TN, input_precision=PRECISION)
    return sum_TN
