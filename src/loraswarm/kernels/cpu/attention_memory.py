"""What an item of attention works on: its query rows, K and V in pages, and scratch memory.

Bare pointers, cut from a thread's scratch memory anew for every item. Used by the other modules of
attention.

Legend: R rows, W columns of a row (E padded to 32), C = 32 keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loraswarm.kernels.cpu.attention_products import address_of
from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import int64_at, moved

LANES = 16
LINE_BYTES = 64
FLOAT_BYTES = 4
PANEL_KEYS = 32


class State(NamedTuple):
    """What the keys so far have left: `output` [R, W] before division, `sums` [R, 16], of whose
    lanes the sum counts, and `peaks` [R]."""

    output: Any
    sums: Any
    peaks: Any


class Scratch(NamedTuple):
    """One item's memory, float32 unless it says otherwise.

    `queries` [R, W] float32, or of the element type where pairs are multiplied; `keys` [W, C] words
    of a block; `rows` [C, W], of its K or V where they cannot be used as they lie, at `row_offsets`
    [C] int64; `scores` [R, C], then weights; `low`, `high` [R], first and last key each row sees;
    `new_peaks`, `factors` [R]; `numbers` [C] 0 to 31; `offsets` [2, C] int64, where the keys of
    this block and of the next lie.
    """

    queries: Any
    keys: Any
    rows: Any
    scores: Any
    low: Any
    high: Any
    new_peaks: Any
    factors: Any
    numbers: Any
    offsets: Any
    row_offsets: Any


class KV(NamedTuple):
    """K of one kv head of a sequence: that of token c of its i-th page begins at element
    `page_ids[i] * page_stride + c * token_stride`, V `value_offset` later."""

    keys: Any
    page_ids: Any
    page_stride: int
    token_stride: int
    value_offset: int
    page_tokens: int


class Rows(NamedTuple):
    """The query rows: those of head 0 of the group begin at `queries`, for the first token.

    Row r is token r // group and head r % group of the group, counted from `first_row` on. Its
    sequence begins at `position`; tokens see the last `window` keys, or all if it is 0.
    """

    queries: Any
    token_stride: int
    head_stride: int
    group: int
    first_row: int
    num_rows: int
    position: int
    window: int
    scale: float
    head_size: int


@called
def cut_scratch(memory: Any, num_rows: int, width: int) -> Scratch:
    """An item's memory, from the first whole cache line on; a loaded vector is one line then."""
    rows = (num_rows + LANES - 1) // LANES * LANES
    memory = moved(memory, (-address_of(memory) & (LINE_BYTES - 1)) // FLOAT_BYTES)
    keys = moved(memory, rows * width)
    rows_of_keys = moved(keys, PANEL_KEYS * width)
    scores = moved(rows_of_keys, PANEL_KEYS * width)
    low = moved(scores, rows * PANEL_KEYS)
    numbers = moved(low, 4 * rows)
    offsets = int64_at(address_of(moved(numbers, PANEL_KEYS)))
    for key in range(PANEL_KEYS):
        numbers[key] = np.float32(key)
        offsets[2 * PANEL_KEYS + key] = key * width
    return Scratch(
        memory,
        keys,
        rows_of_keys,
        scores,
        low,
        moved(low, rows),
        moved(low, 2 * rows),
        moved(low, 3 * rows),
        numbers,
        offsets,
        moved(offsets, 2 * PANEL_KEYS),
    )


@called
def state_after(scratch: Scratch) -> Any:
    """Where memory for a state begins in an item's scratch memory."""
    return moved(scratch.numbers, 7 * PANEL_KEYS)


@called
def cut_state(memory: Any, num_rows: int, width: int) -> State:
    """The parts of `attention_plan.state_floats` float32."""
    rows = (num_rows + LANES - 1) // LANES * LANES
    sums = moved(memory, rows * width)
    return State(memory, sums, moved(sums, rows * LANES))
