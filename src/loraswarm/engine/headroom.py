"""What steps take of a CUDA device's memory beside weights and pool, by trying the largest.

The tokens are padding: they are stored nowhere and attend to nothing. Called by engine/setup before
the pool is sized; padding is also what engine/graphs captures at start.
Legend: T tokens, Z logit rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from loraswarm.engine.buckets import buckets_of
from loraswarm.kernels import AttentionWork
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.models.batch import Batch
from loraswarm.models.decoder import Decoder
from loraswarm.models.layers.backend import Backend

SAMPLING_COPIES = 4
"""Tensors as large as the logits that drawing tokens may hold at one time."""


LORA_TOKEN_BYTES = 4 * 3 * 64 * (1 + 16)
"""Of a token's h, float32, for the 3 parts of a linear at rank 64, and its sums of 16 splits."""
GRAPH_BYTES = 4 << 20
"""Allowed for what the driver keeps of one captured step: hundreds of kernels and their arguments.
"""
GRAPH_SETS = 3
"""Sets of graphs that are allowed for: the base's and those of two tile tables."""
POOL_SHARE = 2
"""Of a step's peak, what all graphs hold: what smaller steps need may lie across what larger ones
left free."""


def step_bytes(
    decoder: Decoder, backend: Backend, geometry: PageGeometry, num_tokens: int, num_rows: int
) -> int:
    """Bytes at the peak of a step of `num_tokens` tokens, `num_rows` of which get logits; 0 on the
    CPU, where nobody asks.

    Raises   torch.OutOfMemoryError if there are not so many.
    """
    if backend.device.type != "cuda":
        return 0
    buffer = _one_page(decoder, backend, geometry)
    num_rows = min(num_rows, num_tokens)
    peak_bytes = _peak_bytes(decoder, padding_batch(buffer, num_tokens, num_rows))
    sampling_bytes = SAMPLING_COPIES * logits_bytes(decoder, num_rows)
    return peak_bytes + sampling_bytes + num_tokens * LORA_TOKEN_BYTES


def graph_bytes(
    decoder: Decoder, backend: Backend, geometry: PageGeometry, num_rows: int, max_tokens: int
) -> int:
    """Bytes that captured decode steps of at most `num_rows` rows keep: the logits, the page table
    of contexts of `max_tokens` tokens and the memory that they share, and each one's own. 0 on the
    CPU, which captures none.

    Raises   torch.OutOfMemoryError if there are not so many.
    """
    if backend.device.type != "cuda":
        return 0
    buffer = _one_page(decoder, backend, geometry)
    shared_bytes = POOL_SHARE * _peak_bytes(decoder, decode_padding(buffer, num_rows))
    shared_bytes += num_rows * geometry.pages_for_tokens(max_tokens) * torch.int32.itemsize
    own_bytes = GRAPH_SETS * len(buckets_of(num_rows)) * GRAPH_BYTES
    return logits_bytes(decoder, num_rows) + shared_bytes + own_bytes


def logits_bytes(decoder: Decoder, num_rows: int) -> int:
    """Bytes of so many rows of logits."""
    return num_rows * decoder.config.vocab_size * torch.float32.itemsize


@torch.inference_mode()
def _peak_bytes(decoder: Decoder, batch: Batch) -> int:
    """What torch takes from a CUDA device at most while a batch of padding runs: what lies between
    its tensors too."""
    device = batch.pool.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_reserved(device)
    decoder.forward(batch)
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_reserved(device) - before_bytes
    torch.cuda.empty_cache()  # what is free now is free for the pool
    return peak_bytes


def _one_page(decoder: Decoder, backend: Backend, geometry: PageGeometry) -> PageBuffer:
    return PageBuffer(1, decoder.config.shape(), geometry, backend.dtype, backend.device)


def padding_batch(buffer: PageBuffer, num_tokens: int, num_rows: int) -> Batch:
    """So many tokens of one sequence that is none, and so many logit rows."""
    device = buffer.pool.device
    token_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    return Batch(
        token_ids=token_T,
        positions=token_T,
        slots=token_T - 1,
        logit_rows=torch.arange(num_rows, device=device),
        attention=AttentionWork(
            query_starts=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            context_lens=torch.zeros(1, dtype=torch.int32, device=device),
            page_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
            max_query_tokens=num_tokens,
            max_context_tokens=num_tokens,
        ),
        tiles=None,
        pages=buffer.pages,
        pool=buffer.pool,
    )


def decode_padding(buffer: PageBuffer, num_rows: int) -> Batch:
    """So many sequences that are none, of one token each, which gets logits."""
    batch = padding_batch(buffer, num_rows, num_rows)
    device = buffer.pool.device
    work = AttentionWork(
        query_starts=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        context_lens=torch.zeros(num_rows, dtype=torch.int32, device=device),
        page_table=torch.zeros(num_rows, 1, dtype=torch.int32, device=device),
        max_query_tokens=1,
        max_context_tokens=1,
    )
    return replace(batch, attention=work)
