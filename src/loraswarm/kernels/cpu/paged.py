"""K and V in pages on the CPU: tensors to kernel arguments and back.

Called through kernels/cpu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.kernels import AttentionWork, reference
from loraswarm.kernels.cpu.arrays import bits, flat_bits
from loraswarm.kernels.cpu.attention import attend
from loraswarm.kernels.cpu.attention_plan import PagedKV, Queries, Work
from loraswarm.kernels.cpu.jit import threads
from loraswarm.kernels.cpu.writing import NewKV, write


def write_kv_(pages: Tensor, layer: int, k_TKE: Tensor, v_TKE: Tensor, slots_T: Tensor) -> None:
    """See `kernels.reference.write_kv_`."""
    reference.check_write_kv(pages, k_TKE, v_TKE, slots_T)
    if slots_T.numel() == 0:
        return
    k, v = flat_bits("k_TKE", k_TKE), flat_bits("v_TKE", v_TKE)
    new = NewKV(k, k_TKE.stride(0), k_TKE.stride(1), v, v_TKE.stride(0), v_TKE.stride(1))
    threads.wake(k_TKE.numel())
    write(_paged_kv(pages, layer), new, slots_T.numpy(), k_TKE.shape[2])


def paged_attention(
    q_THE: Tensor,
    pages: Tensor,
    layer: int,
    work: AttentionWork,
    scale: float,
    window: int | None,
) -> Tensor:
    """See `kernels.reference.paged_attention`."""
    reference.check_attention(q_THE, pages, work)
    reference.check_window(window)
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype)
    if out_THE.numel() == 0:
        return out_THE
    num_heads = q_THE.shape[1]
    token_stride, head_stride, _ = q_THE.stride()
    q = flat_bits("q_THE", q_THE)
    queries = Queries(q, token_stride, head_stride, num_heads, scale, window or 0)
    arrays = Work(work.query_starts.numpy(), work.context_lens.numpy(), work.page_table.numpy())
    num_threads = threads.wake(q_THE.numel() * work.max_context_tokens)
    attend(queries, arrays, _paged_kv(pages, layer), bits("out_THE", out_THE), num_threads)
    return out_THE


def _paged_kv(pages: Tensor, layer: int) -> PagedKV:
    page, one_layer, value, head, token, _ = pages.stride()
    num_pages, num_layers, _, num_heads, page_tokens, head_size = pages.shape
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer is {layer}; pages have {num_layers} layers")
    return PagedKV(
        flat_bits("pages", pages),
        layer * one_layer,
        page,
        value,
        head,
        token,
        num_pages,
        num_heads,
        page_tokens,
        head_size,
    )
