"""Brings the tensors of a batch from the host to a device in one copy.

Knows no model. Called by engine/model_runner; engine/graphs uses the same layout for tensors that
stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from loraswarm.kernels import AttentionWork
from loraswarm.models.batch import Batch

ALIGNMENT_BYTES = 16


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all but its tables, which kernels read on the host, on the device."""
    tensors = host_tensors(batch)
    packed = pack(tensors, device.type == "cuda").to(device, non_blocking=True)
    return with_tensors(batch, views(packed, tensors))


def host_tensors(batch: Batch) -> tuple[Tensor, ...]:
    """What of a batch goes to the device, in the order `with_tensors` takes it."""
    work = batch.attention
    return (
        batch.token_ids,
        batch.positions,
        batch.slots,
        batch.logit_rows,
        work.query_starts,
        work.context_lens,
        work.page_table,
    )


def with_tensors(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """The batch with other tensors in the places of `host_tensors`."""
    token_ids, positions, slots, logit_rows, query_starts, context_lens, page_table = tensors
    work = AttentionWork(
        query_starts,
        context_lens,
        page_table,
        batch.attention.max_query_tokens,
        batch.attention.max_context_tokens,
    )
    return replace(
        batch,
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        logit_rows=logit_rows,
        attention=work,
    )


def pack(tensors: Sequence[Tensor], is_pinned: bool) -> Tensor:
    """The bytes of host tensors one after the other, each aligned; pinned for an asynchronous
    copy."""
    ends = _ends(tensors)
    packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=is_pinned)
    for view, tensor in zip(views(packed, tensors), tensors, strict=True):
        view.copy_(tensor)
    return packed


def views(packed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Where `pack` puts each of these tensors, with its shape and dtype."""
    found = []
    for tensor, begin in zip(tensors, [0, *_ends(tensors)], strict=False):
        part = packed[begin : begin + tensor.nbytes]
        found.append(part.view(tensor.dtype).view(tensor.shape))
    return found


def _ends(tensors: Sequence[Tensor]) -> list[int]:
    sizes = [-(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for tensor in tensors]
    return list(accumulate(sizes))
