"""Attention over paged K and V: decode and chunked prefill in one kernel.

The query rows of one kv head are the lanes of a vector (row r is token r // group, head r % group), so
each element of K and V is read once for all of them and no sum crosses lanes. Called by kernels/cpu
only.

    unit   one sequence at one kv head
    item   a block of 16 or 64 rows of a unit; a unit of one block (decode) also cuts its keys into
           spans, and the thread that ends the last span joins them, in the order of the keys
"""

from __future__ import annotations

from typing import Any

import numpy as np
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
    state_size,
)
from loraswarm.kernels.cpu.attention_rows import (
    Scratch,
    attend_rows,
    gather_rows,
    join_spans,
    new_scratch,
    write_rows,
)
from loraswarm.kernels.cpu.jit import add_atomically, inlined, kernel
from loraswarm.kernels.cpu.vectors import zeros


@kernel
def attend(q: Queries, kv: PagedKV, out_THE: Any, options: Options) -> None:
    """`kernels.reference.paged_attention` into `out_THE`."""
    first_item, first_partial, num_partials = count_items(q, kv, out_THE.shape, options)
    plan = Plan(
        first_item,
        first_partial,
        np.empty((num_partials, state_size(out_THE.shape[2])), np.float32),
        np.zeros(first_partial.size, np.int64),
        np.zeros(1, np.int64),
    )
    for _ in prange(options.num_threads):
        _attend_items(q, kv, out_THE, plan, options)


@inlined
def _attend_items(q: Queries, kv: PagedKV, out_THE: Any, plan: Plan, options: Options) -> None:
    """One thread's share: items until none is left."""
    scratch = new_scratch(out_THE.shape[2], kv.page_tokens)
    group = out_THE.shape[1] // kv.num_heads
    number = add_atomically(plan.next_item, 0, 1)
    while number < plan.first_item[-1]:
        item = find_item(number, q, kv, plan, options.window, group)
        if item.num_rows <= FEW_ROWS:
            gather_rows(zeros(FEW_ROWS), item, q, options, out_THE.shape[2], scratch)
            _attend_item(zeros(FEW_ROWS), item, q, kv, out_THE, plan, scratch)
        else:
            gather_rows(zeros(MANY_ROWS), item, q, options, out_THE.shape[2], scratch)
            _attend_item(zeros(MANY_ROWS), item, q, kv, out_THE, plan, scratch)
        number = add_atomically(plan.next_item, 0, 1)


@inlined
def _attend_item(
    zero: Any, item: Item, q: Queries, kv: PagedKV, out_THE: Any, plan: Plan, scratch: Scratch
) -> None:
    """Compute an item; write its rows if they are complete."""
    head_size = out_THE.shape[2]
    attend_rows(zero, item, q.page_table[item.sequence], kv, head_size, scratch)
    first_partial = plan.first_partial[item.unit]
    if first_partial >= 0:
        num_spans = plan.first_item[item.unit + 1] - plan.first_item[item.unit]
        plan.partials[first_partial + item.span] = scratch.state
        if add_atomically(plan.num_done, item.unit, 1) + 1 < num_spans:
            return
        partials = plan.partials[first_partial : first_partial + num_spans]
        join_spans(zero, partials, head_size, scratch.state)
    write_rows(zero, item, q.starts[item.sequence], out_THE, scratch)
