"""Attention of up to 32 query rows over a run of keys, page by page with a running softmax.

A vector holds one value per row. All memory is bare pointers: element i of row r is at
`i * lanes + r`. Scores are in units of log 2. Knows nothing about threads or other items. Called by
kernels/cpu/attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loraswarm.kernels.cpu.attention_plan import (
    FEW_ROWS,
    MANY_ROWS,
    Item,
    PagedKV,
    Queries,
    padded,
    state_size,
)
from loraswarm.kernels.cpu.jit import called, inlined
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    exp2,
    load,
    load_part,
    maximum,
    memory_of,
    multiply,
    multiply_add,
    num_lanes,
    store,
    store_part,
    subtract,
    where_between,
    zeros,
)

COPY_LANES = 16
LOG2_E = np.float32(1.4426950408889634)
FIRST_PEAK = np.float32(-1.0e30)  # below every score, far above a hidden one
HIDDEN = np.float32(-3.0e38)


class Scratch(NamedTuple):
    """One thread's memory, float32.

    `queries` [E, lanes], `low` and `high` [lanes] (first and last key each row sees), `keys` and
    `values` [C, E], `scores` [C, lanes], `state` [E + 2, lanes] (output, then peaks, then sums),
    `row` [E].
    """

    queries: Any
    low: Any
    high: Any
    keys: Any
    values: Any
    scores: Any
    state: Any
    row: Any


@called
def new_scratch(num_threads: int, head_size: int, page_tokens: int) -> Any:
    """Memory for `cut_scratch`, a row per thread; it must outlive the pointers."""
    width, rows = padded(head_size), padded(page_tokens)
    num_vectors = width + 2 + rows + width + 2
    return np.empty((num_threads, num_vectors * MANY_ROWS + (2 * rows + 1) * width), np.float32)


@called
def cut_scratch(memory: Any, head_size: int, page_tokens: int) -> Scratch:
    """One thread's memory, for items of any number of rows."""
    width, rows = padded(head_size), padded(page_tokens)
    low = width * MANY_ROWS
    scores = low + 2 * MANY_ROWS
    state = scores + rows * MANY_ROWS
    keys = state + state_size(head_size)
    values = keys + rows * width
    return Scratch(
        memory_of(memory, 0),
        memory_of(memory, low),
        memory_of(memory, low + MANY_ROWS),
        memory_of(memory, keys),
        memory_of(memory, values),
        memory_of(memory, scores),
        memory_of(memory, state),
        memory_of(memory, values + rows * width),
    )


@inlined
def gather_rows(zero: Any, item: Item, q: Queries, head_size: int, scratch: Scratch) -> None:
    """Fill `queries`, `low` and `high`; lanes past the last row are zeros and see what it sees."""
    lanes = num_lanes(zero)
    factor = np.float32(q.scale) * LOG2_E
    for i in range(head_size):
        store(zero, scratch.queries, i * lanes)
    for row in range(item.num_rows):
        token = (item.first_row + row) // item.group
        head = item.head * item.group + (item.first_row + row) % item.group
        start = (item.first_token + token) * q.token_stride + head * q.head_stride
        copy_row(q.q, start, scratch.row, 0, head_size)
        for i in range(head_size):
            scratch.queries[i * lanes + row] = scratch.row[i] * factor
    for row in range(lanes):
        token = (item.first_row + min(row, item.num_rows - 1)) // item.group
        scratch.high[row] = np.float32(item.position + token)
        scratch.low[row] = np.float32(0)
        if q.window > 0:
            scratch.low[row] = np.float32(item.position + token - q.window + 1)


@inlined
def attend_rows(zero: Any, item: Item, kv: PagedKV, page_ids: Any, scratch: Scratch) -> None:
    """Output before division, peaks and sums of the item's rows over its keys, into `state`."""
    lanes, head_size = num_lanes(zero), kv.head_size
    state = scratch.state
    peaks, sums = broadcast(zero, FIRST_PEAK), zero
    for i in range(padded(head_size)):
        store(zero, state, i * lanes)
    all_low, all_high = scratch.low[lanes - 1], scratch.high[0]
    key = item.first_key
    while key <= item.last_key:
        page, row = key // kv.page_tokens, key % kv.page_tokens
        count = min(kv.page_tokens - row, item.last_key + 1 - key)
        start = kv.start + page_ids[page] * kv.page_stride
        start += item.head * kv.head_stride + row * kv.token_stride
        _widen_keys(kv, start, count, head_size, scratch)
        _score_keys(zero, count, head_size, scratch)
        if key < all_low or key + count - 1 > all_high:
            _hide_keys(zero, key, count, scratch)
        new_peaks = peaks
        for i in range(count):
            new_peaks = maximum(new_peaks, load(zero, scratch.scores, i * lanes))
        shrinkage = exp2(subtract(peaks, new_peaks))
        peaks, sums = new_peaks, multiply(sums, shrinkage)
        for i in range(count):
            weight = exp2(subtract(load(zero, scratch.scores, i * lanes), peaks))
            store(weight, scratch.scores, i * lanes)
            sums = add(sums, weight)
        _add_values(shrinkage, count, head_size, scratch)
        key += count
    store(peaks, state, padded(head_size) * lanes)
    store(sums, state, (padded(head_size) + 1) * lanes)


@called
def _widen_keys(kv: PagedKV, start: int, count: int, head_size: int, scratch: Scratch) -> None:
    width = padded(head_size)
    for i in range(count):
        key = start + i * kv.token_stride
        copy_row(kv.pages, key, scratch.keys, i * width, head_size)
        copy_row(kv.pages, key + kv.value_offset, scratch.values, i * width, head_size)


@inlined
def copy_row(source: Any, source_start: int, target: Any, target_start: int, count: int) -> None:
    """Copy elements between memory of any two of the element types."""
    zero = zeros(COPY_LANES)
    whole = count - count % COPY_LANES
    for i in range(0, whole, COPY_LANES):
        store(load(zero, source, source_start + i), target, target_start + i)
    if whole < count:
        value = load_part(zero, source, source_start + whole, count - whole)
        store_part(value, target, target_start + whole, count - whole)


@inlined
def _score_keys(zero: Any, count: int, head_size: int, scratch: Scratch) -> None:
    """scores[key, row] = keys[key] . queries[:, row]; rows past `count` hold anything."""
    width = padded(head_size)
    for i in range(0, count, 8):
        scores = _product8(zero, scratch.keys, i * width, (width, 1), head_size, scratch.queries)
        _store4(scores[0], scratch.scores, i * num_lanes(zero))
        _store4(scores[1], scratch.scores, (i + 4) * num_lanes(zero))


@inlined
def _hide_keys(zero: Any, first_key: int, count: int, scratch: Scratch) -> None:
    low, high = load(zero, scratch.low, 0), load(zero, scratch.high, 0)
    hidden = broadcast(zero, HIDDEN)
    for i in range(count):
        key = broadcast(zero, np.float32(first_key + i))
        scores = load(zero, scratch.scores, i * num_lanes(zero))
        store(where_between(low, key, high, scores, hidden), scratch.scores, i * num_lanes(zero))


@inlined
def _add_values(shrinkage: Any, count: int, head_size: int, scratch: Scratch) -> None:
    """state[i, row] = shrinkage * state[i, row] + sum over keys of values[key, i] * weights."""
    lanes, width = num_lanes(shrinkage), padded(head_size)
    zero = subtract(shrinkage, shrinkage)
    for i in range(0, width, 8):
        sums = _product8(zero, scratch.values, i, (1, width), count, scratch.scores)
        _scale_and_add4(sums[0], scratch.state, i * lanes, shrinkage)
        _scale_and_add4(sums[1], scratch.state, (i + 4) * lanes, shrinkage)


@inlined
def _product8(zero: Any, a: Any, start: int, steps: Any, count: int, b: Any) -> Any:
    """For i < 8 the vectors: sum over k < count of a[start + i * steps[0] + k * steps[1]] * b[k].

    Eight sums grow side by side, which hides how long one addition takes.
    """
    lanes = num_lanes(zero)
    first = second = (zero, zero, zero, zero)
    half = 4 * steps[0]
    for k in range(count):
        vector = load(zero, b, k * lanes)
        index = start + k * steps[1]
        first = _multiply_add4(vector, a, index, steps[0], first)
        second = _multiply_add4(vector, a, index + half, steps[0], second)
    return first, second


@inlined
def _multiply_add4(vector: Any, a: Any, index: int, step: int, sums: Any) -> Any:
    return (
        multiply_add(vector, broadcast(vector, a[index]), sums[0]),
        multiply_add(vector, broadcast(vector, a[index + step]), sums[1]),
        multiply_add(vector, broadcast(vector, a[index + 2 * step]), sums[2]),
        multiply_add(vector, broadcast(vector, a[index + 3 * step]), sums[3]),
    )


@inlined
def _store4(values: Any, array: Any, index: int) -> None:
    lanes = num_lanes(values[0])
    store(values[0], array, index)
    store(values[1], array, index + lanes)
    store(values[2], array, index + 2 * lanes)
    store(values[3], array, index + 3 * lanes)


@inlined
def _scale_and_add4(addends: Any, array: Any, index: int, factor: Any) -> None:
    """array = array * factor + addend, for four vectors."""
    lanes = num_lanes(factor)
    new = (
        multiply_add(load(factor, array, index), factor, addends[0]),
        multiply_add(load(factor, array, index + lanes), factor, addends[1]),
        multiply_add(load(factor, array, index + 2 * lanes), factor, addends[2]),
        multiply_add(load(factor, array, index + 3 * lanes), factor, addends[3]),
    )
    _store4(new, array, index)


@called
def join_spans(partials: Any, num_spans: int, lanes: int, head_size: int, state: Any) -> None:
    """The state over all keys from those of spans of them, in order."""
    num_vectors, size = padded(head_size) + 2, state_size(head_size)
    zero = zeros(FEW_ROWS)
    for lane in range(0, lanes, FEW_ROWS):
        peak_index = padded(head_size) * lanes + lane
        peaks = broadcast(zero, FIRST_PEAK)
        for span in range(num_spans):
            peaks = maximum(peaks, load(zero, partials, span * size + peak_index))
        for i in range(num_vectors):
            store(zero, state, i * lanes + lane)
        for span in range(num_spans):
            weight = exp2(subtract(load(zero, partials, span * size + peak_index), peaks))
            for i in range(num_vectors):
                index = i * lanes + lane
                value = load(zero, partials, span * size + index)
                store(multiply_add(value, weight, load(zero, state, index)), state, index)


@called
def write_rows(item: Item, num_heads: int, head_size: int, out: Any, scratch: Scratch) -> None:
    """Divide by the sums and round: the item's rows of the output [T, H, E]."""
    for row in range(item.num_rows):
        token = item.first_token + (item.first_row + row) // item.group
        head = item.head * item.group + (item.first_row + row) % item.group
        sum_of_weights = scratch.state[(padded(head_size) + 1) * item.lanes + row]
        factor = np.float32(1) / sum_of_weights
        for i in range(head_size):
            scratch.row[i] = scratch.state[i * item.lanes + row] * factor
        copy_row(scratch.row, 0, out, (token * num_heads + head) * head_size, head_size)
