"""`paged_attention` on a CUDA device: the checks, and which kernels are launched.

Sequences with one query token are attention_decode's, longer ones attention_prefill's. Which are
which only the device knows: a batch that may have both runs both, and each leaves out what is the
other's. A single sequence that may be longer is attention_prefill's. Where torch's attention over
pages has proved right at the start, a batch that has longer ones is torch's. Called through
kernels/triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.kernels import AttentionWork, reference
from loraswarm.kernels.arguments import require
from loraswarm.kernels.triton.attention_blocks import MAX_HEAD_SIZE, NO_WINDOW, Call
from loraswarm.kernels.triton.attention_decode import attend_single_tokens
from loraswarm.kernels.triton.attention_prefill import attend_chunks
from loraswarm.kernels.triton.attention_torch import torch_choice
from loraswarm.kernels.triton.launch import check_device, on_device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def paged_attention(
    q_THE: Tensor,
    pages: Tensor,
    layer: int,
    work: AttentionWork,
    scale: float,
    window: int | None,
) -> Tensor:
    """See `kernels.reference.paged_attention`; heads of at most 256 elements.

    What `work` holds is not checked, it lies on the device. Tokens of a sequence with context
    length 0, and tokens of no sequence, are padding: what they get is undefined.
    Numerics    at least 16 bits of a weight count in its product with a two-byte value; with
                torch's, as many as the type has. A token's bits depend on its own sequence, on
                attention_decode.num_splits, and on whether torch's is used for its batch.
    """
    _check(q_THE, pages, layer, work)
    reference.check_window(window)
    if q_THE.numel() == 0 or work.context_lens.numel() == 0:
        return torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    if work.max_query_tokens > 1 and torch_choice.takes(pages):
        return torch_choice.attend(q_THE, pages[:, layer], work, scale, window)
    return attend_by_triton(q_THE, pages[:, layer], work, scale, window)


def attend_by_triton(
    q_THE: Tensor, kv: Tensor, work: AttentionWork, scale: float, window: int | None
) -> Tensor:
    """The same of one layer's pages [P, 2, K, C, E], by our kernels; nothing is empty or wrong."""
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    limit = NO_WINDOW if window is None else min(window, NO_WINDOW)
    call = Call(q_THE, kv, out_THE, work, scale, limit)
    with on_device(q_THE):
        may_decode = work.max_query_tokens == 1 or call.num_sequences > 1
        if may_decode:
            attend_single_tokens(call)
        if work.max_query_tokens > 1:
            attend_chunks(call, least_tokens=2 if may_decode else 1)
    return out_THE


def _check(q_THE: Tensor, pages: Tensor, layer: int, work: AttentionWork) -> None:
    reference.check_attention(q_THE, pages, work)
    check_device(
        q_THE=q_THE,
        pages=pages,
        query_starts=work.query_starts,
        context_lens=work.context_lens,
        page_table=work.page_table,
    )
    require(
        q_THE.dtype in DTYPES, f"q_THE is {q_THE.dtype}; attention takes float32, float16, bfloat16"
    )
    require(q_THE.stride(2) == 1, f"q_THE has strides {q_THE.stride()}; its last one must be 1")
    require(pages.stride(5) == 1, f"pages have strides {pages.stride()}; their last must be 1")
    head_size = pages.shape[5]
    require(
        1 <= head_size <= MAX_HEAD_SIZE,
        f"pages have heads of {head_size} elements; attention takes 1 to {MAX_HEAD_SIZE}",
    )
    require(0 <= layer < pages.shape[1], f"layer is {layer}; pages have {pages.shape[1]} layers")
    for name in ("query_starts", "context_lens", "page_table"):
        numbers: Tensor = getattr(work, name)
        require(
            numbers.dtype == torch.int32 and numbers.is_contiguous(),
            f"work.{name} must be contiguous, of int32",
        )
