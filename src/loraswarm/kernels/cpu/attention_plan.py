"""The work of attention, cut into items for the threads: once for all layers of a step.

    unit    up to 60 query rows of one sequence at one kv head; row r of the sequence is
            token r // group, head r % group
    item    a unit, or a span of its keys if the sequence has few rows; whoever ends the last span
            of a unit joins them, in the order of the keys

    rows (group 7)   t0h0 t0h1 ... t0h6 t1h0 ... | t8h4 ...
    keys             |<- span 0: 256 ->|<- span 1 ->| ...

Items depend on their own sequence alone, never on its neighbours or on the number of threads. Knows
nothing about how an item is computed. Called by kernels/cpu/paged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loraswarm.kernels import AttentionWork

SPAN_KEYS = 256
LONG_SPAN_KEYS = 1024
FEW_ROWS = 16
"""A unit of so many rows has short spans; joining those of more rows would take too long."""
MANY_UNITS = 8
"""A sequence with as many units at a kv head is not cut into spans."""
ROWS_PER_UNIT = (60, 48, 32, 16)
PANEL_KEYS = 32
ROW_LANES = 16

# words of an item
PAGE_ROW, HEAD, FIRST_TOKEN, POSITION, FIRST_ROW, NUM_ROWS, FIRST_KEY, END_KEY = range(8)
UNIT, SPAN, NUM_SPANS, PARTIAL, ITEM_WORDS = range(8, 13)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan depends on beside the work. Tokens see the last `window` keys, or all if 0."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_pages: int
    page_tokens: int
    window: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The items, and what threads share while they run.

    `items` [items, ITEM_WORDS] int64. Span i of a unit with several leaves its state in
    `partials[item[PARTIAL]]`; `num_done[unit]` counts those that have ended and is 0 between runs.
    `page_table` [S, pages] int32 is contiguous. `num_products` is about how many multiply-adds.
    """

    items: Any
    partials: Any
    num_done: Any
    page_table: Any
    num_products: int


def make_plan(work: AttentionWork, shape: Shape, max_scratch_floats: int) -> Plan:
    """Raises ValueError where the work leads outside of the batch or of the pages."""
    starts = work.query_starts.numpy().astype(np.int64)
    contexts = work.context_lens.numpy().astype(np.int64)
    page_table = np.ascontiguousarray(work.page_table.numpy(), np.int32)
    _check(starts, contexts, page_table, shape)
    units, num_units = _units(starts, contexts, shape, _rows_per_unit(shape, max_scratch_floats))
    items = _cut_into_spans(units, num_units)
    num_rows = int(items[items[:, PARTIAL] >= 0, NUM_ROWS].max(initial=1))
    num_keys = items[:, END_KEY] - items[:, FIRST_KEY]
    num_partials = int((items[:, PARTIAL] >= 0).sum())
    return Plan(
        items=items,
        partials=np.empty((num_partials, state_floats(num_rows, shape.head_size)), np.float32),
        num_done=np.zeros(len(units) + 1, np.int64),
        page_table=page_table,
        num_products=int((items[:, NUM_ROWS] * num_keys).sum()) * 2 * shape.head_size,
    )


def padded_width(head_size: int) -> int:
    """Elements of a row in scratch memory: whole panels of 32 columns."""
    return -(-head_size // PANEL_KEYS) * PANEL_KEYS


def padded_rows(num_rows: int) -> int:
    """Rows of scratch memory: whole vectors."""
    return -(-num_rows // ROW_LANES) * ROW_LANES


def state_floats(num_rows: int, head_size: int) -> int:
    """Of a unit's output before division, its sums (a vector each) and its peaks."""
    return padded_rows(num_rows) * (padded_width(head_size) + ROW_LANES + 1)


def scratch_floats(num_rows: int, head_size: int) -> int:
    """What an item of so many rows takes, see kernels/cpu/attention_rows."""
    width = padded_width(head_size)
    of_rows = padded_rows(num_rows) * (width + PANEL_KEYS + 4)
    of_keys = 2 * PANEL_KEYS * width + 7 * PANEL_KEYS
    return of_rows + of_keys + state_floats(num_rows, head_size) + ROW_LANES


def _rows_per_unit(shape: Shape, max_scratch_floats: int) -> int:
    for num_rows in ROWS_PER_UNIT:
        if scratch_floats(num_rows, shape.head_size) <= max_scratch_floats:
            return num_rows
    raise ValueError(f"pages have heads of {shape.head_size} elements; the cpu kernels take fewer")


def _check(starts: Any, contexts: Any, page_table: Any, shape: Shape) -> None:
    num_new = np.diff(starts)
    if starts[0] < 0 or (num_new < 0).any() or starts[-1] > shape.num_tokens:
        raise ValueError("work.query_starts must ascend from 0 to at most the number of tokens")
    if (contexts < num_new).any():
        raise ValueError("work.context_lens must count at least the tokens of the batch")
    num_pages = -(-contexts // shape.page_tokens)
    if num_pages.max(initial=0) > page_table.shape[1]:
        raise ValueError("work.page_table has too few pages for work.context_lens")
    is_used = np.arange(page_table.shape[1]) < num_pages[:, None]
    if (is_used & ((page_table < 0) | (page_table >= shape.num_pages))).any():
        raise ValueError("work.page_table names a page that does not exist")


def _units(starts: Any, contexts: Any, shape: Shape, max_rows: int) -> tuple[Any, Any]:
    """Items with all their keys, and for each how many there are of its sequence and head."""
    group = shape.num_heads // shape.num_kv_heads
    num_new = np.diff(starts)
    rows_of = num_new * group
    blocks_of = -(-rows_of // max_rows)
    rows_per_block = -(-rows_of // np.maximum(blocks_of, 1))
    sequence = np.repeat(np.arange(len(num_new)), blocks_of)
    block = np.arange(len(sequence)) - np.repeat(np.cumsum(blocks_of) - blocks_of, blocks_of)
    position = (contexts - num_new)[sequence]
    first_row = block * rows_per_block[sequence]
    num_rows = np.minimum(rows_per_block[sequence], rows_of[sequence] - first_row)
    first_key = np.zeros_like(position)
    if shape.window > 0:
        first_key = np.maximum(position + first_row // group - shape.window + 1, 0)
    columns = {
        PAGE_ROW: sequence,
        FIRST_TOKEN: starts[:-1][sequence],
        POSITION: position,
        FIRST_ROW: first_row,
        NUM_ROWS: num_rows,
        FIRST_KEY: first_key,
        END_KEY: position + (first_row + num_rows - 1) // group + 1,
    }
    units = np.zeros((len(sequence), shape.num_kv_heads, ITEM_WORDS), np.int64)
    for word, values in columns.items():
        units[:, :, word] = values[:, None]
    units[:, :, HEAD] = np.arange(shape.num_kv_heads)
    return units.reshape(-1, ITEM_WORDS), np.repeat(blocks_of[sequence], shape.num_kv_heads)


def _cut_into_spans(units: Any, num_units: Any) -> Any:
    """The items, those with the most work first."""
    span_keys = np.where(units[:, NUM_ROWS] <= FEW_ROWS, SPAN_KEYS, LONG_SPAN_KEYS)
    keys_of = units[:, END_KEY] - units[:, FIRST_KEY]
    spans_of = np.where(num_units < MANY_UNITS, -(-keys_of // span_keys), 1)
    unit = np.repeat(np.arange(len(units)), spans_of)
    span = np.arange(len(unit)) - (np.cumsum(spans_of) - spans_of)[unit]
    items, span_keys = units[unit], span_keys[unit]
    items[:, UNIT], items[:, SPAN], items[:, NUM_SPANS] = unit, span, spans_of[unit]
    is_span = items[:, NUM_SPANS] > 1
    items[:, PARTIAL] = np.where(is_span, np.cumsum(is_span) - 1, -1)
    items[:, FIRST_KEY] += span * span_keys
    is_cut = span < items[:, NUM_SPANS] - 1
    items[is_cut, END_KEY] = (items[:, FIRST_KEY] + span_keys)[is_cut]
    work = items[:, NUM_ROWS] * (items[:, END_KEY] - items[:, FIRST_KEY])
    return np.ascontiguousarray(items[np.argsort(-work, kind="stable")])
