"""What min_p, top_k and top_p leave of each row.

Most rows keep few tokens: those are found among the blocks with the largest maxima, for all rows
together. A row where that proves nothing is sorted. Called by engine/sampler.
Legend: Z rows, V vocabulary, N blocks, K tokens of the chosen blocks, L the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraswarm.core.request import SamplingParams
from loraswarm.core.sequence import Sequence
from loraswarm.engine.row_blocks import block_maxima, block_tokens, row_sums, running_sums

NUM_BLOCKS = 64
NUM_LARGEST = 128
ALL = torch.iinfo(torch.int64).max


def truncate_(logits_ZV: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Set what min_p, top_k and top_p exclude to -inf, row by row; returns `logits_ZV`.

    Order    min_p, top_k, top_p, each of what the one before has left. Of tokens that are equally
             likely top_k keeps all or none, top_p those of the lowest ids.
    """
    vocab_size = logits_ZV.shape[1]
    params = [sequence.request.params for sequence in sequences]
    limited = [row for row, own in enumerate(params) if _is_limited(own, vocab_size)]
    if not limited:
        return logits_ZV
    params = [params[row] for row in limited]
    rows_ZV = logits_ZV if len(limited) == len(sequences) else logits_ZV[limited]
    limits = _limits(params, rows_ZV)
    kept = _candidates(rows_ZV, limits).kept(limits)
    index_Z = torch.tensor(limited, device=logits_ZV.device)
    _keep_only_(logits_ZV, index_Z[kept.is_proven_Z], kept)
    for row in (~kept.is_proven_Z).nonzero()[:, 0].tolist():
        _truncate_row_(logits_ZV[limited[row]], params[row])
    return logits_ZV


@dataclass(frozen=True, slots=True)
class Limits:
    """The parameters of all rows; what a row does not ask for excludes nothing.

    Shapes    log_min_p [Z] float32, -inf for none; top_k [Z] int64, ALL for none; top_p [Z]
              float32, inf for none.
    """

    log_min_p_Z: Tensor
    top_k_Z: Tensor
    top_p_Z: Tensor

    def top_p_alone(self) -> Tensor:
        """Rows whose probabilities are those of the whole row: [Z] bool."""
        return (self.log_min_p_Z == -math.inf) & (self.top_k_Z == ALL)


@dataclass(frozen=True, slots=True)
class Kept:
    """Which candidates of each row stay; of rows that are not proven nothing is known.

    Shapes    tokens [Z, K] int64; logits [Z, K] float32; is_kept [Z, K] and is_proven [Z] bool.
    """

    token_ZK: Tensor
    logit_ZK: Tensor
    is_kept_ZK: Tensor
    is_proven_Z: Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens of the blocks with the largest maxima, by id, and the largest logits among them.

    Shapes    tokens, logits [Z, K], -inf where a block has no such token; largest [Z, L], the
              largest first; best [Z]; others [Z]: no logit elsewhere is larger; total [Z]: the sum
              of exp(logit - best) of the whole row, where top_p alone limits it.
    """

    token_ZK: Tensor
    logit_ZK: Tensor
    largest_ZL: Tensor
    best_Z: Tensor
    others_Z: Tensor
    total_Z: Tensor
    has_all: bool

    def kept(self, limits: Limits) -> Kept:
        """What the limits leave, in the order of `truncate_`."""
        largest_ZL = self.largest_ZL
        num_largest = largest_ZL.shape[1]
        last_Z = limits.top_k_Z.clamp(max=num_largest) - 1
        kth_Z = largest_ZL.gather(1, last_Z[:, None])[:, 0]
        kth_Z = kth_Z.masked_fill(limits.top_k_Z > num_largest, -math.inf)
        floor_Z1 = torch.maximum(self.best_Z + limits.log_min_p_Z, kth_Z)[:, None]
        is_left_ZL = largest_ZL >= floor_Z1
        weight_ZL = (largest_ZL - self.best_Z[:, None]).exp() * is_left_ZL
        has_floor_Z = floor_Z1[:, 0] > -math.inf
        total_Z = torch.where(has_floor_Z, row_sums(weight_ZL), self.total_Z)
        probability_ZL = weight_ZL / total_Z[:, None]
        before_ZL = running_sums(probability_ZL) - probability_ZL
        is_left_ZL &= before_ZL < limits.top_p_Z[:, None]
        num_left_Z1 = is_left_ZL.sum(dim=-1, keepdim=True).clamp(min=1)
        least_Z1 = largest_ZL.gather(1, num_left_Z1 - 1)
        num_ties_Z1 = num_left_Z1 - (largest_ZL > least_Z1).sum(dim=-1, keepdim=True)
        is_tie_ZK = self.logit_ZK == least_Z1
        is_first_ZK = is_tie_ZK & (is_tie_ZK.cumsum(dim=-1) <= num_ties_Z1)
        lowest_Z = torch.where(has_floor_Z, floor_Z1[:, 0], least_Z1[:, 0])
        is_proven_Z = has_floor_Z | limits.top_p_alone()
        if not self.has_all:
            is_proven_Z &= (lowest_Z > self.others_Z) & (largest_ZL[:, -1] < lowest_Z)
        return Kept(
            self.token_ZK, self.logit_ZK, (self.logit_ZK > least_Z1) | is_first_ZK, is_proven_Z
        )


def _is_limited(params: SamplingParams, vocab_size: int) -> bool:
    return params.min_p > 0.0 or 0 < params.top_k < vocab_size or params.top_p < 1.0


def _limits(params: Seq[SamplingParams], rows_ZV: Tensor) -> Limits:
    vocab_size = rows_ZV.shape[1]
    return Limits(
        rows_ZV.new_tensor([np.log(own.min_p) if own.min_p > 0 else -math.inf for own in params]),
        rows_ZV.new_tensor(
            [own.top_k if 0 < own.top_k < vocab_size else ALL for own in params],
            dtype=torch.int64,
        ),
        rows_ZV.new_tensor([own.top_p if own.top_p < 1.0 else math.inf for own in params]),
    )


def _candidates(rows_ZV: Tensor, limits: Limits) -> Candidates:
    maxima_ZN = block_maxima(rows_ZV)
    num_blocks = min(NUM_BLOCKS, maxima_ZN.shape[1])
    largest = maxima_ZN.topk(min(num_blocks + 1, maxima_ZN.shape[1]), dim=-1)
    others_Z = largest.values[:, -1]
    if num_blocks == maxima_ZN.shape[1]:
        others_Z = torch.full_like(others_Z, -math.inf)
    block_ZN = largest.indices[:, :num_blocks].sort(dim=-1).values
    token_ZK, is_inside_ZK = block_tokens(block_ZN, rows_ZV.shape[1])
    logit_ZK = torch.where(is_inside_ZK, rows_ZV.gather(1, token_ZK), -math.inf)
    num_largest = min(NUM_LARGEST, logit_ZK.shape[1])
    best_Z = largest.values[:, 0]
    return Candidates(
        token_ZK,
        logit_ZK,
        logit_ZK.topk(num_largest, dim=-1).values,
        best_Z,
        others_Z,
        _totals(rows_ZV, limits),
        has_all=rows_ZV.shape[1] <= num_largest,
    )


def _totals(rows_ZV: Tensor, limits: Limits) -> Tensor:
    """The sum of exp(logit - best) of the rows that top_p alone limits; 1 for the others."""
    is_whole_Z = limits.top_p_alone()
    total_Z = torch.ones_like(limits.top_p_Z)
    if is_whole_Z.all():
        return 1.0 / rows_ZV.softmax(dim=-1).amax(dim=-1)
    if is_whole_Z.any():
        total_Z[is_whole_Z] = 1.0 / rows_ZV[is_whole_Z].softmax(dim=-1).amax(dim=-1)
    return total_Z


def _keep_only_(logits_ZV: Tensor, index_Z: Tensor, kept: Kept) -> None:
    """In the rows of `index`, the proven ones, set all but what is kept to -inf."""
    proven_Z = kept.is_proven_Z
    if index_Z.numel() == logits_ZV.shape[0]:
        logits_ZV.fill_(-math.inf)
    else:
        logits_ZV[index_Z] = -math.inf
    place, candidate = kept.is_kept_ZK[proven_Z].nonzero().unbind(1)
    token = kept.token_ZK[proven_Z][place, candidate]
    logits_ZV[index_Z[place], token] = kept.logit_ZK[proven_Z][place, candidate]


def _truncate_row_(logits_V: Tensor, params: SamplingParams) -> None:
    """One row by itself, whatever it keeps."""
    if params.min_p > 0.0:
        floor = logits_V.max() + float(np.log(params.min_p))
        logits_V[logits_V < floor] = -math.inf
    if 0 < params.top_k < logits_V.numel():
        kth = logits_V.topk(params.top_k).values[-1]
        logits_V[logits_V < kth] = -math.inf
    if params.top_p < 1.0:
        _keep_nucleus_(logits_V, params.top_p)


def _keep_nucleus_(logits_V: Tensor, top_p: float) -> None:
    """Keep the fewest most likely tokens whose probabilities sum to at least `top_p`.

    NumPy sorts numbers on CPUs many times faster than torch sorts them with their places.
    """
    if logits_V.is_cpu:
        value_V = torch.from_numpy(np.sort(logits_V.numpy())).flip(0)
    else:
        value_V = logits_V.sort(descending=True).values
    probability_V = value_V.softmax(dim=-1)
    before_V = running_sums(probability_V) - probability_V
    num_left = int((before_V < top_p).sum())
    least = value_V[max(num_left - 1, 0)]
    ties = (logits_V == least).nonzero()[:, 0]
    num_ties = num_left - int((value_V > least).sum())
    logits_V.copy_(torch.where(logits_V < least, -math.inf, logits_V))
    logits_V[ties[num_ties:]] = -math.inf
