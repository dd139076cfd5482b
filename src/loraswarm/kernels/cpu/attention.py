"""One item of attention over paged K and V, decode and chunked prefill alike.

The words of an item say which rows of which sequence attend to which keys (kernels/cpu/
attention_plan); where tensors lie is among the operation's arguments. Called by kernels/cpu/
operations and, to record an operation, by kernels/cpu/paged.
"""

from __future__ import annotations

from typing import Any

from loraswarm.kernels.cpu.attention_memory import KV, Rows, cut_scratch, cut_state, state_after
from loraswarm.kernels.cpu.attention_plan import (
    END_KEY,
    FIRST_KEY,
    FIRST_ROW,
    FIRST_TOKEN,
    HEAD,
    ITEM_WORDS,
    NUM_ROWS,
    NUM_SPANS,
    PAGE_ROW,
    PANEL_KEYS,
    PARTIAL,
    POSITION,
    SPAN,
    UNIT,
)
from loraswarm.kernels.cpu.attention_rows import attend_keys, join_spans, write_rows
from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import (
    add_atomically_at,
    float_at,
    int32_at,
    int64_at,
    memory_at,
    moved,
)
from loraswarm.kernels.cpu.vectors import float_of_bits

# arguments
ITEMS, PARTIALS, PARTIAL_FLOATS, NUM_DONE, PAGE_TABLE, PAGES_PER_ROW, SCALE = range(7)
WINDOW, NUM_HEADS, GROUP, HEAD_SIZE = range(7, 11)
PAGE_STRIDE, HEAD_STRIDE, TOKEN_STRIDE, VALUE_OFFSET, PAGE_TOKENS = range(11, 16)
Q_TOKEN_STRIDE, Q_HEAD_STRIDE, Q, PAGES, OUT = range(16, 21)


@called
def attention_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """A unit, or a span of its keys; the thread that ends the last span joins all."""
    words = moved(int64_at(arguments[ITEMS]), item * ITEM_WORDS)
    num_rows, num_spans = words[NUM_ROWS], words[NUM_SPANS]
    width = (arguments[HEAD_SIZE] + PANEL_KEYS - 1) // PANEL_KEYS * PANEL_KEYS
    memory = cut_scratch(scratch, num_rows, width)
    own_state = cut_state(state_after(memory), num_rows, width)
    state = own_state
    size = arguments[PARTIAL_FLOATS]
    partials = moved(float_at(arguments[PARTIALS]), (words[PARTIAL] - words[SPAN]) * size)
    if num_spans > 1:
        state = cut_state(moved(partials, words[SPAN] * size), num_rows, width)
    rows = _rows_of(arguments, words, like)
    kv = _kv_of(arguments, words, like)
    attend_keys(rows, kv, words[FIRST_KEY], words[END_KEY], width, memory, state)
    if num_spans > 1:
        num_done = int64_at(arguments[NUM_DONE])
        if add_atomically_at(num_done, words[UNIT], 1) + 1 < num_spans:
            return
        num_done[words[UNIT]] = 0
        join_spans(partials, size, num_spans, num_rows, width, own_state)
    num_heads = arguments[NUM_HEADS]
    first = words[FIRST_TOKEN] * num_heads + words[HEAD] * arguments[GROUP]
    out = moved(memory_at(like, arguments[OUT]), first * arguments[HEAD_SIZE])
    write_rows(own_state, rows, width, out, num_heads)


@called
def _rows_of(arguments: Any, words: Any, like: Any) -> Rows:
    first = words[FIRST_TOKEN] * arguments[Q_TOKEN_STRIDE]
    first += words[HEAD] * arguments[GROUP] * arguments[Q_HEAD_STRIDE]
    return Rows(
        moved(memory_at(like, arguments[Q]), first),
        arguments[Q_TOKEN_STRIDE],
        arguments[Q_HEAD_STRIDE],
        arguments[GROUP],
        words[FIRST_ROW],
        words[NUM_ROWS],
        words[POSITION],
        arguments[WINDOW],
        float_of_bits(arguments[SCALE]),
        arguments[HEAD_SIZE],
    )


@called
def _kv_of(arguments: Any, words: Any, like: Any) -> KV:
    table = int32_at(arguments[PAGE_TABLE])
    return KV(
        moved(memory_at(like, arguments[PAGES]), words[HEAD] * arguments[HEAD_STRIDE]),
        moved(table, words[PAGE_ROW] * arguments[PAGES_PER_ROW]),
        arguments[PAGE_STRIDE],
        arguments[TOKEN_STRIDE],
        arguments[VALUE_OFFSET],
        arguments[PAGE_TOKENS],
    )
