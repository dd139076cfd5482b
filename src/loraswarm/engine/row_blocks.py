"""Rows of a vocabulary's size in blocks: what one pass over the blocks tells about a row.

Knows nothing about sampling parameters. What it returns for a row depends on that row alone. Called
by engine/sampler and engine/truncation.
Legend: Z rows, V vocabulary, N blocks, B tokens of a block, K tokens of some blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loraswarm.kernels import cpu

BLOCK_TOKENS = 128
WITHIN_BLOCK = np.arange(BLOCK_TOKENS)
SUM_ERROR = BLOCK_TOKENS * 2.0**-24
"""How far float32 sums of a block may be off, as a share of all, whichever way they are added."""


def block_maxima(rows_ZV: Tensor) -> Tensor:
    """The largest element of every block, NaN where there is one: [Z, N]."""
    if rows_ZV.device.type == "cpu":
        return cpu.block_maxima(rows_ZV, BLOCK_TOKENS)
    return torch.cat([part.amax(dim=-1) for part in _blocks(rows_ZV)], dim=1)


def best_tokens(rows_ZV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest element of each row and where it is first: [Z] each; NaN is larger than any."""
    if rows_ZV.is_cuda:
        from loraswarm.kernels.triton.rows import best_tokens as best_on_device

        return best_on_device(rows_ZV)
    # NumPy's argmax takes the first of equal ones and of NaN, and asks no other thread.
    rows, row_Z1 = rows_ZV.numpy(), np.arange(len(rows_ZV))[:, None]
    if len(rows) == 1:
        token_Z = rows.argmax(axis=1)
    else:
        block_Z1 = block_maxima(rows_ZV).numpy().argmax(axis=1)[:, None]
        # Beyond the end stands the last token again, which is not the first of equal ones there.
        token_ZB = np.minimum(block_Z1 * BLOCK_TOKENS + WITHIN_BLOCK, rows.shape[1] - 1)
        token_Z = token_ZB[row_Z1[:, 0], rows[row_Z1, token_ZB].argmax(axis=1)]
    return torch.from_numpy(rows[row_Z1[:, 0], token_Z]), torch.from_numpy(token_Z)


def block_tokens(block_ZN: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The tokens of some blocks, [Z, K], and which of them exist: the last block may have fewer."""
    within_B = torch.arange(BLOCK_TOKENS, device=block_ZN.device)
    token_ZK = (block_ZN[:, :, None] * BLOCK_TOKENS + within_B).flatten(1)
    return token_ZK.clamp(max=vocab_size - 1), token_ZK < vocab_size


def draw(logits_ZV: Tensor, uniform_Z: Tensor) -> Tensor:
    """Inverse-CDF draw: the first token whose cumulative probability exceeds `uniform`.

    Probabilities are added in float64 where their float32 sums by block leave the token open: in
    whatever order those were added, it is the same token.

    Shapes   logits [Z, V] float32; uniform [Z] float64 in [0, 1); returns [Z] int64.
    """
    probability_ZV = logits_ZV.softmax(dim=-1)
    sums = [part.sum(dim=-1) for part in _blocks(probability_ZV)]
    sum_ZN = torch.cat(sums, dim=1).double()
    cumulative_ZN = sum_ZN.cumsum(dim=-1)
    target_Z1 = (uniform_Z * cumulative_ZN[:, -1])[:, None]
    block_Z1 = torch.searchsorted(cumulative_ZN, target_Z1, right=True)
    block_Z1.clamp_(max=sum_ZN.shape[1] - 1)
    before_Z1 = cumulative_ZN.gather(1, block_Z1) - sum_ZN.gather(1, block_Z1)
    token_ZB, is_inside_ZB = block_tokens(block_Z1, logits_ZV.shape[1])
    within_ZB = probability_ZV.gather(1, token_ZB).double() * is_inside_ZB
    edges_ZB = torch.cat([before_Z1, before_Z1 + within_ZB.cumsum(dim=-1)], dim=1)
    place_Z1 = torch.searchsorted(edges_ZB, target_Z1, right=True) - 1
    place_Z1.clamp_(min=0, max=BLOCK_TOKENS - 1)
    token_Z = token_ZB.gather(1, place_Z1)[:, 0]
    is_open_Z = ((edges_ZB - target_Z1).abs() <= 2 * SUM_ERROR).any(dim=-1)
    for row in is_open_Z.nonzero()[:, 0].tolist():
        token_Z[row] = _draw_exactly(probability_ZV[row], uniform_Z[row])
    return token_Z


def running_sums(values_ZN: Tensor) -> Tensor:
    """Of the numbers of each row, which are not negative, up to each place; no zero adds to them.

    On a CUDA device, where torch adds in an order that it leaves open, in one that depends on the
    row's length alone.
    """
    if values_ZN.is_cpu:
        return values_ZN.cumsum(dim=-1)
    return fixed_order_sums(values_ZN)


def row_sums(values_ZN: Tensor) -> Tensor:
    """The sum of each row, [Z], in the order of `running_sums` where torch leaves it open."""
    return values_ZN.sum(dim=-1) if values_ZN.is_cpu else fixed_order_sums(values_ZN)[..., -1]


def fixed_order_sums(values_ZN: Tensor) -> Tensor:
    """As `running_sums`, by doubling how far back every place has added: only element by element.

    Sums at two places are added in different orders, so that one may be rounded below the one
    before it, or a zero may seem to add to it: both are mended.
    """
    sum_ZN, reach = values_ZN, 1
    while reach < values_ZN.shape[-1]:
        further_ZN = sum_ZN[..., reach:] + sum_ZN[..., :-reach]
        sum_ZN = torch.cat([sum_ZN[..., :reach], further_ZN], dim=-1)
        reach *= 2
    return sum_ZN.masked_fill(values_ZN == 0, 0).cummax(dim=-1).values


def _draw_exactly(probability_V: Tensor, uniform: Tensor) -> Tensor:
    cumulative_V = running_sums(probability_V.double())
    target = uniform * cumulative_V[-1]
    return torch.searchsorted(cumulative_V, target, right=True).clamp_(max=len(probability_V) - 1)


def _blocks(rows_ZV: Tensor) -> list[Tensor]:
    """Views: the whole blocks [Z, N, B], then the rest [Z, 1, less than B]."""
    num_whole = rows_ZV.shape[1] // BLOCK_TOKENS
    end = num_whole * BLOCK_TOKENS
    parts = []
    if num_whole:
        parts.append(rows_ZV[:, :end].view(-1, num_whole, BLOCK_TOKENS))
    if end < rows_ZV.shape[1]:
        parts.append(rows_ZV[:, None, end:])
    return parts
