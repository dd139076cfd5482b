"""x times A of the tiles of each token's segment: wide rows in, a few columns of h out.

Programs take pieces of work from a plan's list of items: an item's tiles, for its tokens, over one
split of the in features. The splits' sums are added in their order by the program that comes last,
so bits do not depend on who comes when. Called by lora.
Legend: T tokens, I in features, K of them at a time, R rank columns, Q parts of a fused linear.

    in features   | split 0        | split 1        | ...      | split n-1, cut off at I |
    a split       | block | block  |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.triton import items, words
from loraswarm.kernels.triton.items import DECODE, Cut
from loraswarm.kernels.triton.launch import IS_INTERPRETED, ceil_power, num_cores, on_device
from loraswarm.kernels.triton.plan import DevicePlan

MIN_BLOCK = 16
"""Least in features of a product of the tensor cores."""
DECODE_BLOCK_BYTES, DECODE_SPLITS = 1 << 10, 16
"""Of a row of A at a time; most splits. Many bytes in flight, and every core at one segment."""
PREFILL_BLOCK_BYTES, PREFILL_SPLITS = 1 << 7, 8
PREFILL_SPLIT_FEATURES = 1 << 10
"""A split of prefill has at least so many in features: its sums are written and read again."""
PROGRAMS_PER_CORE = 4
VECTOR_BYTES = 16

ITEM_WORDS, TILE_WORDS = tl.constexpr(items.ITEM_WORDS), tl.constexpr(words.TILE_WORDS)
FIRST_TOKEN, NUM_TOKENS = tl.constexpr(items.FIRST_TOKEN), tl.constexpr(items.NUM_TOKENS)
FIRST_TILE, NUM_TILES = tl.constexpr(items.FIRST_TILE), tl.constexpr(items.NUM_TILES)
COLUMN, SITE = tl.constexpr(items.COLUMN), tl.constexpr(items.SITE)
A_OFFSET, A_STRIDE = tl.constexpr(words.A_OFFSET), tl.constexpr(words.A_STRIDE)
RANKS, TILE_RANKS = tl.constexpr(words.RANKS), tl.constexpr(MAX_TILE_RANKS)
WIDENS_PRODUCTS = tl.constexpr(IS_INTERPRETED)
"""The interpreter multiplies the bits of bfloat16 as integers, so it is given float32."""


class ShrinkBlocks(NamedTuple):
    """Sizes of a piece of work, powers of two, and how many blocks are on their way at a time."""

    block_tokens: int
    block_ranks: int
    block_features: int
    split_features: int
    num_stages: int


def shrink_blocks(in_features: int, item_size: int, cut: Cut, most_tiles: int) -> ShrinkBlocks:
    """For elements of `item_size` bytes. Splits depend on the width and the cut alone."""
    is_decode = cut == DECODE
    block_bytes = DECODE_BLOCK_BYTES if is_decode else PREFILL_BLOCK_BYTES
    most_splits = DECODE_SPLITS if is_decode else PREFILL_SPLITS
    width = max(ceil_power(in_features), MIN_BLOCK)
    block = min(block_bytes // item_size, width)
    split = block if is_decode else min(max(block, PREFILL_SPLIT_FEATURES), width)
    while split * most_splits < in_features:
        split *= 2
    num_stages = 1 if split == block else 2 if is_decode else 3
    block_ranks = MAX_TILE_RANKS * ceil_power(min(most_tiles, cut.item_tiles))
    return ShrinkBlocks(cut.item_tokens, block_ranks, block, split, num_stages)


def launch_shrink(
    x_TI: Tensor,
    h_QTR: Tensor,
    pool: Tensor,
    plan: DevicePlan,
    first_site: int,
    num_items: int | None,
) -> None:
    """Fill h. Everything is checked; h is not empty. `num_items` is None if unknown here."""
    num_parts, num_tokens, num_columns = h_QTR.shape
    in_features = x_TI.shape[1]
    most_tiles = num_columns // MAX_TILE_RANKS
    blocks = shrink_blocks(in_features, x_TI.element_size(), plan.table.cut, most_tiles)
    num_splits = -(-in_features // blocks.split_features)
    partial = h_QTR
    if num_splits > 1:
        partial = torch.empty((num_splits, *h_QTR.shape), dtype=h_QTR.dtype, device=h_QTR.device)
    alignment = plan.shrink_traits(first_site, num_parts).alignment
    is_aligned = alignment * x_TI.element_size() >= VECTOR_BYTES
    num_programs = PROGRAMS_PER_CORE * num_cores(x_TI.device)
    if num_items is not None:
        num_programs = min(num_programs, num_items * num_splits)
    with on_device(x_TI):
        shrink_kernel[(num_programs,)](
            x_TI,
            h_QTR,
            partial,
            pool,
            plan.counters,
            plan.words.shrink_starts,
            plan.words.shrink_items,
            plan.words.tiles,
            first_site,
            num_parts,
            num_tokens,
            most_tiles,
            IN_FEATURES=in_features,
            NUM_SPLITS=num_splits,
            SPLIT=blocks.split_features,
            BLOCK_T=blocks.block_tokens,
            BLOCK_R=blocks.block_ranks,
            BLOCK_K=blocks.block_features,
            VECTOR=VECTOR_BYTES // x_TI.element_size() if is_aligned else 1,
            STAGES=blocks.num_stages,
            num_warps=4,
            num_stages=1,
        )


@triton.jit(do_not_specialize=["first_site", "num_parts", "num_rows", "most_tiles"])
def shrink_kernel(
    x_ptr,
    h_ptr,
    partial_ptr,
    pool_ptr,
    counter_ptr,
    start_ptr,
    item_ptr,
    tile_ptr,
    first_site,
    num_parts,
    num_rows,
    most_tiles,
    IN_FEATURES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h [Q, rows, 16 most_tiles] of the items of `num_parts` sites.

    `VECTOR` divides where rows of A begin. `partial` has a copy of h for each split. No element is
    read that is not of an item's tokens or of its tiles' ranks; none is written beyond h, whatever
    the items say.
    """
    first_item = tl.load(start_ptr + first_site)
    num_pieces = (tl.load(start_ptr + first_site + num_parts) - first_item) * NUM_SPLITS
    piece = tl.program_id(0)
    while piece < num_pieces:
        item = first_item + piece // NUM_SPLITS
        split = piece % NUM_SPLITS
        word_ptr = item_ptr + item.to(tl.int64) * ITEM_WORDS
        first_token = tl.load(word_ptr + FIRST_TOKEN)
        num_tokens = tl.load(word_ptr + NUM_TOKENS)
        first_tile = tl.load(word_ptr + FIRST_TILE)
        num_tiles = tl.load(word_ptr + NUM_TILES)
        column = tl.multiple_of(tl.load(word_ptr + COLUMN), TILE_RANKS)
        part = tl.load(word_ptr + SITE) - first_site

        rank_R = tl.arange(0, BLOCK_R)
        is_tile_R = rank_R // TILE_RANKS < num_tiles
        words_R = tile_ptr + (first_tile + rank_R // TILE_RANKS).to(tl.int64) * TILE_WORDS
        offset_R = tl.load(words_R + A_OFFSET, mask=is_tile_R, other=0)
        stride_R = tl.load(words_R + A_STRIDE, mask=is_tile_R, other=0)
        ranks_R = tl.load(words_R + RANKS, mask=is_tile_R, other=0)
        is_rank_R = is_tile_R & (rank_R % TILE_RANKS < ranks_R)
        a_at_R = tl.multiple_of(offset_R + rank_R % TILE_RANKS * stride_R, VECTOR)

        token_T = tl.arange(0, BLOCK_T)
        row_T = first_token + token_T
        is_token_T = (token_T < num_tokens) & (row_T < num_rows)
        x_at_T = row_T.to(tl.int64) * IN_FEATURES

        sum_TR = tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32)
        for first in tl.range(0, SPLIT, BLOCK_K, num_stages=STAGES):
            feature_K = split * SPLIT + first + tl.arange(0, BLOCK_K)
            is_feature_1K = (feature_K < IN_FEATURES)[None, :]
            x_TK = tl.load(
                x_ptr + (x_at_T[:, None] + feature_K[None, :]),
                mask=is_token_T[:, None] & is_feature_1K,
                other=0.0,
            )
            a_RK = tl.load(
                pool_ptr + (a_at_R[:, None] + feature_K[None, :]),
                mask=is_rank_R[:, None] & is_feature_1K,
                other=0.0,
            )
            if WIDENS_PRODUCTS:
                x_TK = x_TK.to(tl.float32)
                a_RK = a_RK.to(tl.float32)
            sum_TR = tl.dot(x_TK, tl.trans(a_RK), sum_TR, input_precision="ieee")

        # Whole tiles are stored: what has no rank is zero.
        num_columns = most_tiles * TILE_RANKS
        column_R = column + rank_R
        h_at_T = (part * num_rows + row_T).to(tl.int64) * num_columns
        h_at_TR = h_at_T[:, None] + column_R[None, :]
        is_h_TR = is_token_T[:, None] & (is_tile_R & (column_R < num_columns))[None, :]
        if NUM_SPLITS == 1:
            tl.store(h_ptr + h_at_TR, sum_TR, mask=is_h_TR)
        else:
            num_cells = (num_parts * num_rows).to(tl.int64) * num_columns
            tl.store(partial_ptr + split * num_cells + h_at_TR, sum_TR, mask=is_h_TR)
            # All threads have stored before one of them tells; who reads the last count reads past
            # the first-level cache, which does not see what other cores have stored.
            tl.debug_barrier()
            num_before = tl.atomic_add(counter_ptr + item, 1, sem="acq_rel", scope="gpu")
            if num_before == NUM_SPLITS - 1:
                tl.debug_barrier()
                total_TR = tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32)
                for index in tl.range(0, NUM_SPLITS, num_stages=1):
                    total_TR += tl.load(
                        partial_ptr + index * num_cells + h_at_TR,
                        mask=is_h_TR,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                tl.store(h_ptr + h_at_TR, total_TR, mask=is_h_TR)
                tl.store(counter_ptr + item, 0)
        piece += tl.num_programs(0)
