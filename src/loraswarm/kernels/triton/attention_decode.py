"""Attention of sequences that have one query token: their contexts are read once, by many programs.

A program has one sequence, one kv head with all its query heads, and a share of the context's
blocks of keys; where a context is cut into several shares, a second kernel joins them in order.
Sequences with more tokens are kernels/triton/attention_prefill's. Called by kernels/triton/
attention.
Legend: see kernels/triton/attention_blocks; X splits of a context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraswarm.kernels.triton.attention_blocks import (
    MIN_PRODUCT,
    NUM_STAGES,
    Call,
    add_values,
    keys_and_values,
    num_warps,
    padded_size,
    scores_of,
)
from loraswarm.kernels.triton.launch import ceil_power, num_cores

MAX_SPLITS = 64
MIN_SPLIT_TOKENS = 128
"""Fewer tokens of context are read sooner by one program than by two and a join."""
PROGRAMS_PER_CORE = 2
"""Programs that shared memory lets run beside each other on a multiprocessor."""
MAX_KEYS = 128
JOIN_WARPS = 4


def attend_single_tokens(call: Call) -> None:
    """Write the rows of `call.out_THE` that are the only token of a sequence.

    Cost    each key and value of their contexts is read once, whatever the group.
    """
    num_programs = call.num_sequences * call.num_kv_heads
    context_tokens = min(call.work.max_context_tokens, call.window)
    splits = num_splits(num_programs, context_tokens, num_cores(call.q_THE.device))
    states, sums = _scratch(call, splits)
    rows = max(MIN_PRODUCT, ceil_power(call.group))
    decode_kernel[(num_programs * splits,)](
        *call.arguments(),
        states,
        sums,
        splits,
        **call.constants(MAX_KEYS),
        BLOCK_ROWS=rows,
        IS_SPLIT=splits > 1,
        num_warps=num_warps(rows),
        num_stages=NUM_STAGES,
    )
    if splits > 1:
        _, num_heads, head_size = call.q_THE.shape
        join_kernel[(call.num_sequences * num_heads,)](
            call.out_THE,
            states,
            sums,
            call.work.query_starts,
            call.work.context_lens,
            splits,
            NUM_HEADS=num_heads,
            HEAD_SIZE=head_size,
            MAX_SPLITS=MAX_SPLITS,
            BLOCK_SIZE=padded_size(head_size),
            num_warps=JOIN_WARPS,
        )


def _scratch(call: Call, splits: int) -> tuple[Tensor, Tensor]:
    """`states` and `sums` of the kernels; one split needs neither."""
    if splits == 1:
        return call.out_THE, call.out_THE
    device = call.q_THE.device
    _, num_heads, head_size = call.q_THE.shape
    shape = (call.num_sequences, num_heads, splits)
    states = torch.empty((*shape, 2), dtype=torch.float32, device=device)
    sums = torch.empty((*shape, head_size), dtype=torch.float32, device=device)
    return states, sums


def num_splits(num_programs: int, max_context_tokens: int, cores: int) -> int:
    """Into how many shares every context is cut: a power of two, 1 to MAX_SPLITS.

    As many as keep the device busy with `num_programs` programs a share, but none of the longest
    context is less than MIN_SPLIT_TOKENS.
    """
    wanted = PROGRAMS_PER_CORE * cores // num_programs
    useful = max_context_tokens // MIN_SPLIT_TOKENS
    return 1 << (max(1, min(wanted, useful, MAX_SPLITS)).bit_length() - 1)


@triton.jit(
    do_not_specialize=["pages_per_row", "window", "num_splits"],
    do_not_specialize_on_alignment=["query_starts", "context_lens", "page_table"],
)
def decode_kernel(
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
    states,
    sums,
    num_splits,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Programs are numbered by kv head first, so that those beside each other read one page.

    Writes out, or with IS_SPLIT `states` [S, H, X, 2], the top and sum of the running softmax, and
    `sums` [S, H, X, E], its out. A split without keys leaves a sum of 0 and no out.
    """
    program = tl.program_id(0)
    kv_head = program % NUM_KV_HEADS
    split = program // NUM_KV_HEADS % num_splits
    sequence = program // NUM_KV_HEADS // num_splits
    token = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    context = tl.load(context_lens + sequence)
    first_key = tl.maximum(context - window, 0)
    first_block = first_key // BLOCK_KEYS
    end_block = tl.cdiv(context, BLOCK_KEYS)
    share = tl.cdiv(end_block - first_block, num_splits)
    begin = first_block + split * share
    end = tl.minimum(begin + share, end_block)

    row_R = tl.arange(0, BLOCK_ROWS)
    column_E = tl.arange(0, BLOCK_SIZE)
    head_R = kv_head * GROUP + row_R
    is_row_R = row_R < GROUP
    is_wanted_RE = is_row_R[:, None] & (column_E < HEAD_SIZE)[None, :]
    q_row_R = token.to(tl.int64) * q_token_stride + head_R * q_head_stride
    q_RE = tl.load(q + q_row_R[:, None] + column_E[None, :], mask=is_wanted_RE, other=0.0)

    kv += kv_head * head_stride
    page_row = page_table + sequence.to(tl.int64) * pages_per_row
    top_R = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_ROWS], tl.float32)
    out_RE = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    for block in range(begin, end):
        key_N = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        is_key_N = (key_N >= first_key) & (key_N < context)
        k_NE, v_NE = keys_and_values(
            kv,
            page_row,
            key_N,
            is_key_N,
            page_stride,
            value_stride,
            token_stride,
            HEAD_SIZE,
            PAGE_TOKENS,
            BLOCK_SIZE,
        )
        score_RN = tl.where(is_key_N[None, :], scores_of(q_RE, k_NE, scale), float("-inf"))
        top_R, sum_R, out_RE = add_values(score_RN, v_NE, top_R, sum_R, out_RE, False)

    if IS_SPLIT:
        heads_before = sequence.to(tl.int64) * (NUM_KV_HEADS * GROUP)
        part_R = (heads_before + head_R) * num_splits + split
        tl.store(states + 2 * part_R, top_R, mask=is_row_R)
        tl.store(states + 2 * part_R + 1, sum_R, mask=is_row_R)
        at_RE = sums + part_R[:, None] * HEAD_SIZE + column_E[None, :]
        tl.store(at_RE, out_RE, mask=is_wanted_RE & (begin < end))
    else:
        out_RE = out_RE / tl.where(is_row_R & (context > 0), sum_R, 1.0)[:, None]
        out_row_R = token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head_R
        at_RE = out + out_row_R[:, None] * HEAD_SIZE + column_E[None, :]
        tl.store(at_RE, out_RE.to(out.dtype.element_ty), mask=is_wanted_RE)


@triton.jit(
    do_not_specialize=["num_splits"],
    do_not_specialize_on_alignment=["query_starts", "context_lens"],
)
def join_kernel(
    out,
    states,
    sums,
    query_starts,
    context_lens,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One program per sequence and query head: the splits of its context in one fixed order."""
    program = tl.program_id(0)
    sequence = program // NUM_HEADS
    token = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    context = tl.load(context_lens + sequence)
    split_X = tl.arange(0, MAX_SPLITS)
    is_split_X = split_X < num_splits
    part_X = program.to(tl.int64) * num_splits + split_X
    top_X = tl.load(states + 2 * part_X, mask=is_split_X, other=float("-inf"))
    sum_X = tl.load(states + 2 * part_X + 1, mask=is_split_X, other=0.0)
    has_keys_X = sum_X != 0.0
    top = tl.max(top_X, 0)
    weight_X = tl.where(has_keys_X, tl.exp2(top_X - tl.where(context > 0, top, 0.0)), 0.0)

    column_E = tl.arange(0, BLOCK_SIZE)
    is_column_E = column_E < HEAD_SIZE
    at_XE = sums + part_X[:, None] * HEAD_SIZE + column_E[None, :]
    out_XE = tl.load(at_XE, mask=has_keys_X[:, None] & is_column_E[None, :], other=0.0)
    total = tl.where(context > 0, tl.sum(weight_X * sum_X, 0), 1.0)
    out_E = tl.sum(weight_X[:, None] * out_XE, 0) / total
    head = token.to(tl.int64) * NUM_HEADS + program % NUM_HEADS
    at_E = out + head * HEAD_SIZE + column_E
    tl.store(at_E, out_E.to(out.dtype.element_ty), mask=is_column_E)
