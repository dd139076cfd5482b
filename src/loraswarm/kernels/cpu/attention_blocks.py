"""Attention of query rows to one block of up to 32 keys: scores, then weights, then the output.

Scores are in units of log 2. Lanes are keys where weights are made and columns where values are
added, so no lane is idle however few rows there are. Called by kernels/cpu/attention_rows; legend
in kernels/cpu/attention_memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loraswarm.kernels.cpu.attention_memory import (
    FLOAT_BYTES,
    KV,
    LANES,
    LINE_BYTES,
    PANEL_KEYS,
    Rows,
    Scratch,
    State,
)
from loraswarm.kernels.cpu.attention_products import (
    add_rows,
    address_of,
    element_bytes,
    greatest,
    multiplies_pairs,
    multiply_panel,
    transpose_words,
)
from loraswarm.kernels.cpu.dot import MAX_ROWS, dot_panel
from loraswarm.kernels.cpu.jit import called, inlined
from loraswarm.kernels.cpu.memory import memory_at, moved, prefetch
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    exp2,
    load,
    load_part,
    maximum,
    multiply,
    multiply_add,
    store,
    store_part,
    subtract,
    where_between,
    zeros,
)

HIDDEN = np.float32(-3.0e38)
ONE = np.float32(1)


@called
def find_keys(kv: KV, first_key: int, count: int, offsets: Any) -> None:
    """Where 32 keys lie; those past `count` are the last again."""
    page, token = divmod(first_key, kv.page_tokens)
    start = kv.page_ids[page] * kv.page_stride
    offset = start + token * kv.token_stride
    for i in range(PANEL_KEYS):
        offsets[i] = offset
        if i + 1 < count:
            token += 1
            offset += kv.token_stride
            if token == kv.page_tokens:
                page, token = page + 1, 0
                offset = kv.page_ids[page] * kv.page_stride


@called
def prefetch_rows(memory: Any, offsets: Any, count: int, head_size: int) -> None:
    """Ask for rows of K or V that the next block will read."""
    for i in range(count):
        for column in range(0, head_size, LINE_BYTES // element_bytes(memory)):
            prefetch(memory, offsets[i] + column)


@called
def pack_keys(kv: KV, offsets: Any, size: int, width: int, scratch: Scratch) -> None:
    """Fill `keys` with the words of 32 keys; `values` is overwritten if they must be prepared."""
    per_word = 2 if multiplies_pairs(kv.keys) else 1
    is_ready = element_bytes(kv.keys) * per_word == FLOAT_BYTES
    if is_ready and size % per_word == 0 and size >= LANES * per_word:
        transpose_words(kv.keys, offsets, size // per_word, per_word, scratch.keys)
    elif multiplies_pairs(kv.keys):
        staged = memory_at(kv.keys, address_of(scratch.rows))
        _copy_keys(kv.keys, offsets, size, width, staged)
        transpose_words(staged, scratch.row_offsets, width // per_word, per_word, scratch.keys)
    else:
        _copy_keys(kv.keys, offsets, size, width, scratch.rows)
        transpose_words(scratch.rows, scratch.row_offsets, width, per_word, scratch.keys)


@called
def _copy_keys(source: Any, offsets: Any, size: int, width: int, target: Any) -> None:
    """Rows of 32 keys, padded with zeros, one after another."""
    for i in range(PANEL_KEYS):
        copy_row(source, offsets[i], target, i * width, size)
        for column in range(size, width):
            target[i * width + column] = 0


@called
def score_keys(rows: Rows, width: int, scratch: Scratch) -> None:
    """scores[r, c] = queries[r] . keys[:, c]"""
    row = 0
    while row < rows.num_rows:
        num_rows = _next_rows(rows.num_rows - row)
        scores = moved(scratch.scores, row * PANEL_KEYS)
        if multiplies_pairs(rows.queries):
            queries = memory_at(rows.queries, address_of(scratch.queries))
            num_pairs = (rows.head_size + 1) // 2
            keys = memory_at(queries, address_of(scratch.keys))
            dot_panel(
                moved(queries, row * width),
                width,
                num_rows,
                keys,
                num_pairs,
                keys,
                0,
                scores,
            )
        else:
            for i in range(num_rows * PANEL_KEYS):
                scores[i] = np.float32(0)
            queries = moved(scratch.queries, row * width)
            multiply_panel(queries, width, num_rows, scratch.keys, rows.head_size, scores)
        row += num_rows


@called
def _next_rows(num_rows: int) -> int:
    """How many rows the next product takes: blocks of equal size, up to what registers hold."""
    num_blocks = (num_rows + MAX_ROWS - 1) // MAX_ROWS
    return (num_rows + num_blocks - 1) // num_blocks


@called
def weigh_keys(
    rows: Rows, key: int, count: int, width: int, scratch: Scratch, state: State
) -> None:
    """Turn scores into weights; bring peaks, sums and the output to the new peaks."""
    num_rows = rows.num_rows
    _scale_scores(rows, key, count, scratch)
    zero = zeros(LANES)
    for i in range(0, num_rows, LANES):
        old = load(zero, state.peaks, i)
        new = maximum(old, load(zero, scratch.new_peaks, i))
        store(exp2(subtract(old, new)), scratch.factors, i)
        store(new, state.peaks, i)
    for i in range(num_rows):
        peak = broadcast(zero, state.peaks[i])
        first, second = i * PANEL_KEYS, i * PANEL_KEYS + LANES
        low = exp2(subtract(load(zero, scratch.scores, first), peak))
        high = exp2(subtract(load(zero, scratch.scores, second), peak))
        store(low, scratch.scores, first)
        store(high, scratch.scores, second)
        factor = broadcast(zero, scratch.factors[i])
        sums = multiply_add(load(zero, state.sums, i * LANES), factor, add(low, high))
        store(sums, state.sums, i * LANES)
        if scratch.factors[i] != ONE:
            for column in range(i * width, (i + 1) * width, LANES):
                store(multiply(load(zero, state.output, column), factor), state.output, column)


@called
def _scale_scores(rows: Rows, key: int, count: int, scratch: Scratch) -> None:
    """Scores in units of log 2, hidden where a row does not see the key; and `new_peaks`."""
    zero = zeros(LANES)
    factor, hidden = broadcast(zero, np.float32(rows.scale)), broadcast(zero, HIDDEN)
    start = broadcast(zero, np.float32(key))
    low_keys = add(load(zero, scratch.numbers, 0), start)
    high_keys = add(load(zero, scratch.numbers, LANES), start)
    last_key = np.float32(key + count - 1)
    is_whole = (
        count == PANEL_KEYS
        and scratch.high[0] >= last_key
        and scratch.low[rows.num_rows - 1] <= np.float32(key)
    )
    for i in range(rows.num_rows):
        first, second = i * PANEL_KEYS, i * PANEL_KEYS + LANES
        low = multiply(load(zero, scratch.scores, first), factor)
        high = multiply(load(zero, scratch.scores, second), factor)
        if not is_whole:
            begin = broadcast(zero, scratch.low[i])
            end = broadcast(zero, min(scratch.high[i], last_key))
            low = where_between(begin, low_keys, end, low, hidden)
            high = where_between(begin, high_keys, end, high, hidden)
        store(low, scratch.scores, first)
        store(high, scratch.scores, second)
        scratch.new_peaks[i] = greatest(maximum(low, high))


@called
def add_values(
    num_rows: int,
    kv: KV,
    offsets: Any,
    count: int,
    size: int,
    width: int,
    scratch: Scratch,
    output: Any,
) -> None:
    """output[r] += sum over keys of weights[r, key] * V[key]"""
    values = moved(kv.keys, kv.value_offset)
    if size < width:
        rows = memory_at(kv.keys, address_of(scratch.rows))
        _copy_keys(values, offsets, size, width, rows)
        values, offsets = rows, scratch.row_offsets
    row = 0
    while row < num_rows:
        num_next = _next_rows(num_rows - row)
        weights = moved(scratch.scores, row * PANEL_KEYS)
        for column in range(0, width, PANEL_KEYS):
            sums = moved(output, row * width + column)
            add_rows(weights, num_next, moved(values, column), offsets, count, sums, width)
        row += num_next


@inlined
def copy_row(source: Any, source_start: int, target: Any, target_start: int, count: int) -> None:
    """Copy elements between memory of any two of the element types."""
    zero = zeros(LANES)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        store(load(zero, source, source_start + i), target, target_start + i)
    if whole < count:
        value = load_part(zero, source, source_start + whole, count - whole)
        store_part(value, target, target_start + whole, count - whole)
