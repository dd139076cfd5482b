"""What the largest step takes of a CUDA device's memory beside weights and pool, by trying it.

The tokens are padding: they are stored nowhere and attend to nothing. Called by engine/setup before
the pool is sized.
Legend: T tokens, Z logit rows, V vocabulary.
"""

from __future__ import annotations

import torch

from loraswarm.kernels import AttentionWork
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.models.batch import Batch
from loraswarm.models.decoder import Decoder
from loraswarm.models.layers.backend import Backend

SAMPLING_COPIES = 4
"""Tensors as large as the logits that drawing tokens may hold at one time."""


@torch.inference_mode()
def step_bytes(
    decoder: Decoder, backend: Backend, geometry: PageGeometry, num_tokens: int, num_rows: int
) -> int:
    """Bytes at the peak of a step of `num_tokens` tokens, `num_rows` of which get logits; 0 on the
    CPU, where nobody asks.

    Raises   torch.OutOfMemoryError if there are not so many.
    """
    if backend.device.type != "cuda":
        return 0
    buffer = PageBuffer(1, decoder.config.shape(), geometry, backend.dtype, backend.device)
    batch = padding_batch(buffer, num_tokens, min(num_rows, num_tokens))
    torch.cuda.synchronize(backend.device)
    torch.cuda.reset_peak_memory_stats(backend.device)
    before = torch.cuda.memory_allocated(backend.device)
    logits_ZV = decoder.forward(batch)
    torch.cuda.synchronize(backend.device)
    peak = torch.cuda.max_memory_allocated(backend.device) - before
    sampling_bytes = SAMPLING_COPIES * logits_ZV.nbytes
    del logits_ZV
    torch.cuda.empty_cache()  # what is free now is free for the pool
    return peak + sampling_bytes


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
