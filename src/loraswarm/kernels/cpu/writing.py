"""Stores new K and V in their pages; copies bits. An item of the operation is some tokens.

Called by kernels/cpu/operations and, to record an operation, by kernels/cpu/paged.
"""

from __future__ import annotations

from typing import Any

from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import int64_at, memory_at, moved

# arguments: where pages and slots lie, of both operations that write K and V
PAGES, PAGE_STRIDE, HEAD_STRIDE, TOKEN_STRIDE, VALUE_OFFSET, PAGE_TOKENS = range(6)
NUM_KV_HEADS, HEAD_SIZE, SLOTS, SLOT_STRIDE, NUM_TOKENS, TOKENS_PER_ITEM = range(6, 12)
PLACE_WORDS = 12
K, K_TOKEN_STRIDE, K_HEAD_STRIDE, V, V_TOKEN_STRIDE, V_HEAD_STRIDE = range(12, 18)


@called
def write_kv_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """K and V of some tokens."""
    k, v = memory_at(like, arguments[K]), memory_at(like, arguments[V])
    first = item * arguments[TOKENS_PER_ITEM]
    size, value_offset = arguments[HEAD_SIZE], arguments[VALUE_OFFSET]
    for token in range(first, min(first + arguments[TOKENS_PER_ITEM], arguments[NUM_TOKENS])):
        page = page_row(arguments, token, like)
        for head in range(arguments[NUM_KV_HEADS]):
            k_from = token * arguments[K_TOKEN_STRIDE] + head * arguments[K_HEAD_STRIDE]
            v_from = token * arguments[V_TOKEN_STRIDE] + head * arguments[V_HEAD_STRIDE]
            copy_bits(k, k_from, page, head * arguments[HEAD_STRIDE], size)
            copy_bits(v, v_from, page, head * arguments[HEAD_STRIDE] + value_offset, size)


@called
def page_row(arguments: Any, token: int, like: Any) -> Any:
    """Where K of a token's first kv head goes."""
    slot = int64_at(arguments[SLOTS])[token * arguments[SLOT_STRIDE]]
    page, row = divmod(slot, arguments[PAGE_TOKENS])
    offset = page * arguments[PAGE_STRIDE] + row * arguments[TOKEN_STRIDE]
    return moved(memory_at(like, arguments[PAGES]), offset)


@called
def copy_bits(source: Any, source_start: int, target: Any, target_start: int, count: int) -> None:
    """Copy elements as they are."""
    for i in range(count):
        target[target_start + i] = source[source_start + i]
