"""Attention of up to 60 query rows over a run of keys, a block at a time with a running softmax.

Knows nothing about threads or other items, except how the states of spans of keys are joined.
Called by kernels/cpu/attention; legend in kernels/cpu/attention_memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loraswarm.kernels.cpu.attention_blocks import (
    add_values,
    copy_row,
    find_keys,
    pack_keys,
    prefetch_rows,
    score_keys,
    weigh_keys,
)
from loraswarm.kernels.cpu.attention_memory import (
    KV,
    LANES,
    PANEL_KEYS,
    Rows,
    Scratch,
    State,
    cut_state,
)
from loraswarm.kernels.cpu.attention_products import address_of, in_order, multiplies_pairs
from loraswarm.kernels.cpu.dot import MAX_ROWS
from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import memory_at, moved
from loraswarm.kernels.cpu.vectors import (
    broadcast,
    exp2,
    load,
    multiply,
    multiply_add,
    store,
    store_up_to,
    subtract,
    total,
    zeros,
)

FIRST_PEAK = np.float32(-1.0e30)  # below every score, far above a hidden one
ONE = np.float32(1)


@called
def attend_keys(
    rows: Rows, kv: KV, first_key: int, end_key: int, width: int, scratch: Scratch, state: State
) -> None:
    """The state of the rows after these keys; every row sees at least one key of its unit."""
    _gather_rows(rows, width, scratch)
    _clear(rows.num_rows, width, state)
    size = rows.head_size
    offsets, next_offsets = scratch.offsets, moved(scratch.offsets, PANEL_KEYS)
    find_keys(kv, first_key, min(end_key - first_key, PANEL_KEYS), offsets)
    key = first_key
    while key < end_key:
        count = min(end_key - key, PANEL_KEYS)
        num_next = min(end_key - key - count, PANEL_KEYS)
        if num_next > 0:
            find_keys(kv, key + count, num_next, next_offsets)
        if rows.num_rows > MAX_ROWS:
            num_next = 0
        pack_keys(kv, offsets, size, width, scratch)
        prefetch_rows(kv.keys, next_offsets, num_next, size)
        score_keys(rows, width, scratch)
        prefetch_rows(moved(kv.keys, kv.value_offset), next_offsets, num_next, size)
        weigh_keys(rows, key, count, width, scratch, state)
        add_values(rows.num_rows, kv, offsets, count, size, width, scratch, state.output)
        key += count
        offsets, next_offsets = next_offsets, offsets


@called
def _gather_rows(rows: Rows, width: int, scratch: Scratch) -> None:
    """Fill `queries`, `low` and `high`."""
    for i in range(rows.num_rows):
        token, head = divmod(rows.first_row + i, rows.group)
        start = token * rows.token_stride + head * rows.head_stride
        if multiplies_pairs(rows.queries):
            bits = memory_at(rows.queries, address_of(scratch.queries))
            copy_row(rows.queries, start, bits, i * width, rows.head_size)
            if rows.head_size % 2 == 1:
                bits[i * width + rows.head_size] = 0
        else:
            copy_row(rows.queries, start, scratch.queries, i * width, rows.head_size)
        last = rows.position + token
        scratch.high[i] = np.float32(last)
        scratch.low[i] = np.float32(0)
        if rows.window > 0:
            scratch.low[i] = np.float32(last - rows.window + 1)


@called
def _clear(num_rows: int, width: int, state: State) -> None:
    zero = zeros(LANES)
    for i in range(0, num_rows * width, LANES):
        store(zero, state.output, i)
    for i in range(num_rows):
        store(zero, state.sums, i * LANES)
        state.peaks[i] = FIRST_PEAK


@called
def join_spans(
    partials: Any, size: int, num_spans: int, num_rows: int, width: int, state: State
) -> None:
    """The state over all keys from those of spans of them, in order, `size` elements apart."""
    zero = zeros(LANES)
    _clear(num_rows, width, state)
    for span in range(num_spans):
        part = cut_state(moved(partials, span * size), num_rows, width)
        for i in range(num_rows):
            state.peaks[i] = max(state.peaks[i], part.peaks[i])
    for span in range(num_spans):
        part = cut_state(moved(partials, span * size), num_rows, width)
        for i in range(num_rows):
            peak = broadcast(zero, state.peaks[i])
            weight = exp2(subtract(broadcast(zero, part.peaks[i]), peak))
            sums = load(zero, state.sums, i * LANES)
            store(
                multiply_add(load(zero, part.sums, i * LANES), weight, sums),
                state.sums,
                i * LANES,
            )
            for column in range(i * width, (i + 1) * width, LANES):
                value = load(zero, state.output, column)
                value = multiply_add(load(zero, part.output, column), weight, value)
                store(value, state.output, column)


@called
def write_rows(state: State, rows: Rows, width: int, out: Any, num_heads: int) -> None:
    """Divide by the sums and round; `out` is where the first token's head 0 of the group goes."""
    zero = zeros(LANES)
    size = rows.head_size
    for i in range(rows.num_rows):
        token, head = divmod(rows.first_row + i, rows.group)
        start = (token * num_heads + head) * size
        factor = broadcast(zero, ONE / total(load(zero, state.sums, i * LANES)))
        for column in range(0, size, PANEL_KEYS):
            at = i * width + column
            one = multiply(load(zero, state.output, at), factor)
            two = multiply(load(zero, state.output, at + LANES), factor)
            left = size - column
            store_up_to(in_order(one, two, 0, out), out, start + column, left)
            if left > LANES:
                store_up_to(in_order(one, two, 1, out), out, start + column + LANES, left - LANES)
