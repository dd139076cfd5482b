"""The kernel that stores new K and V in their pages; copies bits, so it knows only element sizes.

Called by kernels/cpu only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import prange

from loraswarm.kernels.cpu.attention_plan import PagedKV
from loraswarm.kernels.cpu.jit import called, kernel
from loraswarm.kernels.cpu.vectors import memory_of


class NewKV(NamedTuple):
    """k and v as flat arrays: head h of token t begins at `t * token_stride + h * head_stride`."""

    k: Any
    k_token_stride: int
    k_head_stride: int
    v: Any
    v_token_stride: int
    v_head_stride: int


@kernel
def write(kv: PagedKV, new: NewKV, slots_T: Any, head_size: int) -> None:
    """`kernels.reference.write_kv_`; nothing is written if a slot does not exist."""
    for slot in slots_T:
        if slot < 0 or slot >= kv.num_pages * kv.page_tokens:
            raise ValueError("slots_T names a slot outside of pages")
    num_tokens = slots_T.size
    for token in prange(num_tokens):
        _write_token(kv, new, token, slots_T[token], head_size)


@called
def _write_token(kv: PagedKV, new: NewKV, token: int, slot: int, head_size: int) -> None:
    page, row = divmod(slot, kv.page_tokens)
    start = kv.start + page * kv.page_stride + row * kv.token_stride
    for head in range(kv.num_heads):
        key = start + head * kv.head_stride
        k_page, v_page = memory_of(kv.pages, key), memory_of(kv.pages, key + kv.value_offset)
        k = memory_of(new.k, token * new.k_token_stride + head * new.k_head_stride)
        v = memory_of(new.v, token * new.v_token_stride + head * new.v_head_stride)
        for i in range(head_size):
            k_page[i] = k[i]
            v_page[i] = v[i]
