"""Attention of sequences that have several query tokens, with the history before them.

A program has one kv head and a block of rows: consecutive tokens of one sequence, each with all its
query heads. Called by kernels/triton/attention.
Legend: see kernels/triton/attention_blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraswarm.kernels.triton.attention_blocks import (
    NUM_STAGES,
    Call,
    add_values,
    keys_and_values,
    num_warps,
    scores_of,
)
from loraswarm.kernels.triton.launch import ceil_power

FLOAT32_ROWS = 16
"""float32 is not multiplied by tensor cores: its blocks must fit registers."""
FEW_ROWS = 64
MANY_ROWS = 128
MAX_KEYS = 64
"""With more, scores and weights of MANY_ROWS do not leave registers for the rest."""
SEARCH_BLOCK = 128
"""Sequences whose starts are compared at a time."""


def attend_chunks(call: Call, least_tokens: int) -> None:
    """Write the rows of `call.out_THE` that are tokens of sequences with `least_tokens` or more.

    Cost    every block of keys that a block of rows can see is read once by it. A shorter
            sequence costs programs that leave at once.
    """
    num_tokens = call.q_THE.shape[0]
    rows = block_rows(call.group, call.work.max_query_tokens, call.kv.itemsize)
    tokens = rows // call.group
    # Sequence s has its first block at query_starts[s] // tokens + s: enough for any lengths.
    num_blocks = num_tokens // tokens + call.num_sequences
    prefill_kernel[(num_blocks * call.num_kv_heads,)](
        *call.arguments(),
        call.num_sequences,
        least_tokens,
        **call.constants(MAX_KEYS),
        BLOCK_ROWS=rows,
        BLOCK_TOKENS=tokens,
        SEARCH_BLOCK=SEARCH_BLOCK,
        num_warps=num_warps(rows),
        num_stages=NUM_STAGES,
    )


def block_rows(group: int, max_query_tokens: int, element_bytes: int) -> int:
    """Rows of a block: a power of two, at least one token's query heads."""
    if element_bytes == 4:
        rows = FLOAT32_ROWS
    else:
        rows = FEW_ROWS if max_query_tokens * group <= FEW_ROWS else MANY_ROWS
    return max(rows, ceil_power(group))


@triton.jit(
    do_not_specialize=["pages_per_row", "window", "num_sequences", "least_tokens"],
    do_not_specialize_on_alignment=["query_starts", "context_lens", "page_table"],
)
def prefill_kernel(
    q,
    kv,
    out,
    query_starts,
    context_lens,
    page_table,
    pages_per_row,
    window,
    scale,
    q_token_stride,
    q_head_stride,
    page_stride,
    value_stride,
    head_stride,
    token_stride,
    num_sequences,
    least_tokens,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr,
):
    """Blocks of rows from the last to the first: the longest contexts begin first.

    Row r is query head r % GROUP of the block's token r // GROUP. Blocks of keys that every token
    sees ("open") come first, then those that some do not: at the window's edge and at the end.

        keys      first_key .. | ......................... | .. high
        blocks    begin        open_begin ........ open_end     end
    """
    program = tl.program_id(0)
    kv_head = program % NUM_KV_HEADS
    row_block = tl.num_programs(0) // NUM_KV_HEADS - 1 - program // NUM_KV_HEADS
    sequence = sequence_of(query_starts, num_sequences, row_block, BLOCK_TOKENS, SEARCH_BLOCK)
    start = tl.load(query_starts + sequence)
    num_tokens = tl.load(query_starts + sequence + 1) - start
    first_token = (row_block - start // BLOCK_TOKENS - sequence) * BLOCK_TOKENS
    if (num_tokens < least_tokens) | (first_token >= num_tokens):
        return
    context = tl.load(context_lens + sequence)
    # Positions of the block's tokens: low .. high - 1. Both are below 0 where a context is 0.
    low = context - num_tokens + first_token
    high = tl.minimum(low + BLOCK_TOKENS, context)
    first_key = tl.maximum(low - window + 1, 0)
    begin = first_key // BLOCK_KEYS
    end = tl.cdiv(tl.maximum(high, 0), BLOCK_KEYS)
    open_begin = tl.minimum(tl.cdiv(tl.maximum(high - window, 0), BLOCK_KEYS), end)
    open_end = tl.maximum(tl.maximum(low + 1, 0) // BLOCK_KEYS, open_begin)

    row_R = tl.arange(0, BLOCK_ROWS)
    column_E = tl.arange(0, BLOCK_SIZE)
    token_R = first_token + row_R // GROUP
    head_R = kv_head * GROUP + row_R % GROUP
    is_row_R = (row_R < BLOCK_TOKENS * GROUP) & (token_R < num_tokens)
    is_wanted_RE = is_row_R[:, None] & (column_E < HEAD_SIZE)[None, :]
    batch_token_R = (start + token_R).to(tl.int64)
    q_row_R = batch_token_R * q_token_stride + head_R * q_head_stride
    q_RE = tl.load(q + q_row_R[:, None] + column_E[None, :], mask=is_wanted_RE, other=0.0)

    kv += kv_head * head_stride
    page_row = page_table + sequence.to(tl.int64) * pages_per_row
    top_R = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_ROWS], tl.float32)
    out_RE = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    for block in range(open_begin, open_end):
        key_N = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k_NE, v_NE = keys_and_values(
            kv,
            page_row,
            key_N,
            key_N < high,
            page_stride,
            value_stride,
            token_stride,
            HEAD_SIZE,
            PAGE_TOKENS,
            BLOCK_SIZE,
        )
        score_RN = scores_of(q_RE, k_NE, scale)
        top_R, sum_R, out_RE = add_values(score_RN, v_NE, top_R, sum_R, out_RE, False)

    position_R1 = (context - num_tokens + token_R)[:, None]
    num_before = open_begin - begin
    for index in range(num_before + end - open_end):
        block = tl.where(index < num_before, begin + index, open_end + index - num_before)
        key_N = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k_NE, v_NE = keys_and_values(
            kv,
            page_row,
            key_N,
            (key_N >= first_key) & (key_N < high),
            page_stride,
            value_stride,
            token_stride,
            HEAD_SIZE,
            PAGE_TOKENS,
            BLOCK_SIZE,
        )
        key_1N = key_N[None, :]
        is_seen_RN = (key_1N <= position_R1) & (key_1N > position_R1 - window)
        score_RN = tl.where(is_seen_RN, scores_of(q_RE, k_NE, scale), float("-inf"))
        top_R, sum_R, out_RE = add_values(score_RN, v_NE, top_R, sum_R, out_RE, True)

    out_RE = out_RE / tl.where(is_row_R & (context > 0), sum_R, 1.0)[:, None]
    out_row_R = batch_token_R * (NUM_KV_HEADS * GROUP) + head_R
    at_RE = out + out_row_R[:, None] * HEAD_SIZE + column_E[None, :]
    tl.store(at_RE, out_RE.to(out.dtype.element_ty), mask=is_wanted_RE)


@triton.jit
def sequence_of(
    query_starts,
    num_sequences,
    row_block,
    BLOCK_TOKENS: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr,
):
    """The last sequence whose first block is not after `row_block`."""
    num_begun = 0
    for first in range(0, num_sequences, SEARCH_BLOCK):
        index = first + tl.arange(0, SEARCH_BLOCK)
        is_sequence = index < num_sequences
        start = tl.load(query_starts + index, mask=is_sequence, other=0)
        has_begun = is_sequence & (start // BLOCK_TOKENS + index <= row_block)
        num_begun += tl.sum(has_begun.to(tl.int32), 0)
    return num_begun - 1
