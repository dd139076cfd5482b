"""Attention over paged K and V: decode and chunked prefill in one kernel.

The query rows of one kv head are the lanes of a vector (row r is token r // group, head r % group),
so each element of K and V is read once for all of them and no sum crosses lanes. Called by
kernels/cpu only.

    unit   one sequence at one kv head
    item   a block of 16 or 32 rows of a unit; a unit of one block (decode) also cuts its keys into
           spans, and the thread that ends the last span joins them, in the order of the keys
"""

from __future__ import annotations

from typing import Any

from numba import prange

from loraswarm.kernels.cpu.attention_plan import (
    FEW_ROWS,
    MANY_ROWS,
    Item,
    Options,
    PagedKV,
    Plan,
    Queries,
    count_items,
    find_item,
    new_counters,
)
from loraswarm.kernels.cpu.attention_rows import (
    Scratch,
    attend_rows,
    gather_rows,
    join_spans,
    new_scratch,
    write_rows,
)
from loraswarm.kernels.cpu.jit import add_atomically, called, kernel
from loraswarm.kernels.cpu.vectors import zeros


@kernel
def attend(q: Queries, kv: PagedKV, out_THE: Any, options: Options) -> None:
    """`kernels.reference.paged_attention` into `out_THE`."""
    first_item, first_partial, partials = count_items(q, kv, out_THE.shape, options.window)
    num_done, next_item = new_counters(first_partial.size)
    plan = Plan(first_item, first_partial, partials, num_done, next_item)
    for _ in prange(options.num_threads):
        _attend_items(q, kv, out_THE, plan, options)


@called
def _attend_items(q: Queries, kv: PagedKV, out_THE: Any, plan: Plan, options: Options) -> None:
    """One thread's share: items until none is left."""
    scratch = new_scratch(kv.head_size, kv.page_tokens)
    group = out_THE.shape[1] // kv.num_heads
    number = add_atomically(plan.next_item, 0, 1)
    while number < plan.first_item[-1]:
        item = find_item(number, q, kv, plan, options.window, group)
        if item.num_rows <= FEW_ROWS:
            _attend_few_rows(item, q, kv, options, scratch)
        else:
            _attend_many_rows(item, q, kv, options, scratch)
        if plan.first_partial[item.unit] < 0 or _join_if_last(item, kv.head_size, plan, scratch):
            write_rows(item, q.starts[item.sequence], out_THE, scratch)
        number = add_atomically(plan.next_item, 0, 1)


@called
def _attend_few_rows(item: Item, q: Queries, kv: PagedKV, options: Options, scratch: Any) -> None:
    gather_rows(zeros(FEW_ROWS), item, q, options, kv.head_size, scratch)
    attend_rows(zeros(FEW_ROWS), item, q.page_table[item.sequence], kv, scratch)


@called
def _attend_many_rows(item: Item, q: Queries, kv: PagedKV, options: Options, scratch: Any) -> None:
    gather_rows(zeros(MANY_ROWS), item, q, options, kv.head_size, scratch)
    attend_rows(zeros(MANY_ROWS), item, q.page_table[item.sequence], kv, scratch)


@called
def _join_if_last(item: Item, head_size: int, plan: Plan, scratch: Scratch) -> bool:
    """Leave the state of a span; if it is the unit's last to end, put that of all in `scratch`."""
    first_partial = plan.first_partial[item.unit]
    num_spans = plan.first_item[item.unit + 1] - plan.first_item[item.unit]
    for i in range(scratch.state.size):
        plan.partials[first_partial + item.span, i] = scratch.state[i]
    if add_atomically(plan.num_done, item.unit, 1) + 1 < num_spans:
        return False
    partials = plan.partials[first_partial : first_partial + num_spans]
    join_spans(partials, item.lanes, head_size, scratch.state)
    return True
