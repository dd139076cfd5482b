"""The work of one attention call, cut into items for the threads.

    rows of a unit (group 7)    t0h0 t0h1 ... t0h6 t1h0 ... | t4h4 ...      blocks of 32
    keys of a block             |<- span 0: 256 ->|<- span 1 ->| ...        only if one block

Items depend on the batch alone, never on the number of threads. Knows nothing about how an item is
computed. Called by kernels/cpu/attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loraswarm.kernels.cpu.jit import called

FEW_ROWS = 16
MANY_ROWS = 32
SPAN_KEYS = 256


class Queries(NamedTuple):
    """q: head h of token t begins at `t * token_stride + h * head_stride`.

    Tokens see the last `window` keys, or all if it is 0.
    """

    q: Any
    token_stride: int
    head_stride: int
    num_heads: int
    scale: float
    window: int


class Work(NamedTuple):
    """The arrays of `AttentionWork`: [S + 1], [S] and [S, pages]."""

    starts: Any
    contexts: Any
    page_table: Any


class PagedKV(NamedTuple):
    """One layer of the pages.

    K of token c of a page, at kv head h, begins at
    `start + page * page_stride + h * head_stride + c * token_stride`, V `value_offset` later.
    """

    pages: Any
    start: int
    page_stride: int
    value_offset: int
    head_stride: int
    token_stride: int
    num_pages: int
    num_heads: int
    page_tokens: int
    head_size: int


class Plan(NamedTuple):
    """The items of a call, and what the threads share while they run.

    Unit u = sequence * kv heads + kv head has items `first_item[u] : first_item[u + 1]`. If they
    are spans, span i leaves its state in `partials[first_partial[u] + i]`, else `first_partial[u]`
    is -1. `num_done[u]` counts the spans that have ended.
    """

    first_item: Any
    first_partial: Any
    partials: Any
    num_done: Any
    next_item: Any


class Item(NamedTuple):
    """Rows `first_row : first_row + num_rows` of a unit against keys `first_key` to `last_key`.

    The sequence's tokens in the batch begin at `first_token`, at `position` of the sequence.
    `lanes` is the size of the vectors that hold one value per row: 16 or 32.
    """

    unit: int
    sequence: int
    head: int
    group: int
    first_token: int
    position: int
    span: int
    first_row: int
    num_rows: int
    lanes: int
    first_key: int
    last_key: int


@called
def state_size(head_size: int) -> int:
    """Elements of an item's running output, peaks and sums."""
    return (padded(head_size) + 2) * MANY_ROWS


@called
def padded(size: int) -> int:
    """`size` rounded up to what one step of a product makes."""
    return (size + 7) // 8 * 8


@called
def count_items(work: Work, kv: PagedKV, num_tokens: int, num_heads: int, window: int) -> Any:
    """`first_item`, `first_partial` and `partials` of a `Plan`.

    Raises    ValueError where the work leads outside of the batch or of the pages.
    """
    group = num_heads // kv.num_heads
    num_units = work.contexts.size * kv.num_heads
    first_item = np.zeros(num_units + 1, np.int64)
    first_partial = np.full(num_units, -1, np.int64)
    num_partials = 0
    for unit in range(num_units):
        sequence = unit // kv.num_heads
        if unit % kv.num_heads == 0:
            _check_sequence(work, kv, sequence, num_tokens)
        num_new = work.starts[sequence + 1] - work.starts[sequence]
        num_items = (num_new * group + MANY_ROWS - 1) // MANY_ROWS
        if num_items == 1:
            first_key = _first_key(work.contexts[sequence] - num_new, window)
            num_items = (work.contexts[sequence] - first_key + SPAN_KEYS - 1) // SPAN_KEYS
            if num_items > 1:
                first_partial[unit] = num_partials
                num_partials += num_items
        first_item[unit + 1] = first_item[unit] + num_items
    partials = np.empty((num_partials, state_size(kv.head_size)), np.float32)
    return first_item, first_partial, partials


@called
def new_counters(num_units: int) -> Any:
    """`num_done` and `next_item` of a `Plan`."""
    return np.zeros(num_units, np.int64), np.zeros(1, np.int64)


@called
def _first_key(position: int, window: int) -> int:
    """The first key that a token at `position` sees."""
    if window == 0:
        return 0
    return max(0, position - window + 1)


@called
def _check_sequence(work: Work, kv: PagedKV, sequence: int, num_tokens: int) -> None:
    begin, end = work.starts[sequence], work.starts[sequence + 1]
    context = work.contexts[sequence]
    if begin < 0 or begin > end or end > num_tokens:
        raise ValueError("work.query_starts must ascend from 0 to at most the number of tokens")
    if context < end - begin:
        raise ValueError("work.context_lens must count at least the tokens of the batch")
    num_pages = (context + kv.page_tokens - 1) // kv.page_tokens
    if num_pages > work.page_table.shape[1]:
        raise ValueError("work.page_table has too few pages for work.context_lens")
    for page in work.page_table[sequence, :num_pages]:
        if page < 0 or page >= kv.num_pages:
            raise ValueError("work.page_table names a page that does not exist")


@called
def find_item(number: int, work: Work, kv: PagedKV, plan: Plan, group: int, window: int) -> Item:
    """The item with this number."""
    unit: Any = np.searchsorted(plan.first_item, number, side="right") - 1
    sequence, head = unit // kv.num_heads, unit % kv.num_heads
    first_token: Any = np.int64(work.starts[sequence])
    num_tokens = work.starts[sequence + 1] - first_token
    position = work.contexts[sequence] - num_tokens
    index = number - plan.first_item[unit]
    span, first_row = 0, index * MANY_ROWS
    if plan.first_partial[unit] >= 0:
        span, first_row = index, 0
    num_rows = min(num_tokens * group - first_row, MANY_ROWS)
    lanes = FEW_ROWS if num_rows <= FEW_ROWS else MANY_ROWS
    first_key = _first_key(position + first_row // group, window)
    last_key = position + (first_row + num_rows - 1) // group
    if plan.first_partial[unit] >= 0:
        first_key += span * SPAN_KEYS
        last_key = min(last_key, first_key + SPAN_KEYS - 1)
    return Item(
        unit,
        sequence,
        head,
        group,
        first_token,
        position,
        span,
        first_row,
        num_rows,
        lanes,
        first_key,
        last_key,
    )
