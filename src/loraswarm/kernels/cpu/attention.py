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
    PagedKV,
    Plan,
    Queries,
    Work,
    count_items,
    find_item,
    new_counters,
    state_size,
)
from loraswarm.kernels.cpu.attention_rows import (
    Scratch,
    attend_rows,
    cut_scratch,
    gather_rows,
    join_spans,
    new_scratch,
    write_rows,
)
from loraswarm.kernels.cpu.jit import add_atomically, called, kernel
from loraswarm.kernels.cpu.vectors import memory_of, zeros


@kernel
def attend(q: Queries, work: Work, kv: PagedKV, out_THE: Any, num_threads: int) -> None:
    """`kernels.reference.paged_attention` into `out_THE`."""
    first_item, first_partial, partials = count_items(
        work, kv, out_THE.shape[0], q.num_heads, q.window
    )
    num_done, next_item = new_counters(first_partial.size)
    plan = Plan(first_item, first_partial, partials, num_done, next_item)
    scratch = new_scratch(num_threads, kv.head_size, kv.page_tokens)
    for thread in prange(num_threads):
        _attend_items(q, work, kv, out_THE, plan, scratch[thread])


@called
def _attend_items(
    q: Queries, work: Work, kv: PagedKV, out_THE: Any, plan: Plan, thread_scratch: Any
) -> None:
    """One thread's share: items until none is left."""
    queries = Queries(
        memory_of(q.q, 0), q.token_stride, q.head_stride, q.num_heads, q.scale, q.window
    )
    pages = PagedKV(
        memory_of(kv.pages, 0),
        kv.start,
        kv.page_stride,
        kv.value_offset,
        kv.head_stride,
        kv.token_stride,
        kv.num_pages,
        kv.num_heads,
        kv.page_tokens,
        kv.head_size,
    )
    scratch = cut_scratch(thread_scratch, kv.head_size, kv.page_tokens)
    group = q.num_heads // kv.num_heads
    number = add_atomically(plan.next_item, 0, 1)
    while number < plan.first_item[-1]:
        item = find_item(number, work, kv, plan, group, q.window)
        page_ids = memory_of(work.page_table, item.sequence * work.page_table.shape[1])
        if item.lanes == FEW_ROWS:
            _attend_few_rows(item, queries, pages, page_ids, scratch)
        else:
            _attend_many_rows(item, queries, pages, page_ids, scratch)
        if plan.first_partial[item.unit] < 0 or _join_if_last(item, kv.head_size, plan, scratch):
            write_rows(item, q.num_heads, kv.head_size, memory_of(out_THE, 0), scratch)
        number = add_atomically(plan.next_item, 0, 1)


@called
def _attend_few_rows(item: Item, q: Queries, kv: PagedKV, page_ids: Any, scratch: Scratch) -> None:
    gather_rows(zeros(FEW_ROWS), item, q, kv.head_size, scratch)
    attend_rows(zeros(FEW_ROWS), item, kv, page_ids, scratch)


@called
def _attend_many_rows(item: Item, q: Queries, kv: PagedKV, page_ids: Any, scratch: Scratch) -> None:
    gather_rows(zeros(MANY_ROWS), item, q, kv.head_size, scratch)
    attend_rows(zeros(MANY_ROWS), item, kv, page_ids, scratch)


@called
def _join_if_last(item: Item, head_size: int, plan: Plan, scratch: Scratch) -> bool:
    """Leave the state of a span; if it is the unit's last to end, put that of all in `scratch`."""
    first_partial = plan.first_partial[item.unit]
    num_spans = plan.first_item[item.unit + 1] - plan.first_item[item.unit]
    size = state_size(head_size)
    partials = memory_of(plan.partials, first_partial * size)
    for i in range(size):
        partials[item.span * size + i] = scratch.state[i]
    if add_atomically(plan.num_done, item.unit, 1) + 1 < num_spans:
        return False
    join_spans(partials, num_spans, item.lanes, head_size, scratch.state)
    return True
