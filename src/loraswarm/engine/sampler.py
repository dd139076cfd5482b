"""Draws one token for each row of logits, by the row's own parameters and its own randomness.

Pure functions. A row's result depends on its logits, its tokens, its parameters, its seed and its
position only, not on what else is in the batch. Called by the engine after the model.
Legend: Z rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from loraswarm.core.events import TokenLogprob
from loraswarm.core.sequence import Sequence

NOT_FINITE = -1
NONE_ALLOWED = -2


def sample(logits_ZV: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """One token id per row; NOT_FINITE where the model's logits are NaN or infinite, NONE_ALLOWED
    where the row's own parameters leave no token to choose.

    Order    repetition, presence and frequency penalties, logit bias, end tokens barred before
             min_tokens, temperature, min_p, top_k, top_p; temperature 0 takes the likeliest token.
    Shapes   logits [Z, V] float32, changed in place.
    """
    best_Z, token_Z = logits_ZV.max(dim=-1)
    is_finite_Z = best_Z.isfinite()
    adjusted = [row for row, sequence in enumerate(sequences) if adjust_(logits_ZV[row], sequence)]
    if adjusted:
        best_Z[adjusted], token_Z[adjusted] = logits_ZV[adjusted].max(dim=-1)
    drawn = [row for row, sequence in enumerate(sequences) if not _is_greedy(sequence)]
    if drawn:
        params = [sequences[row].request.params for row in drawn]
        rows_ZV = logits_ZV if len(drawn) == len(sequences) else logits_ZV[drawn]
        temperature_Z1 = rows_ZV.new_tensor([p.temperature for p in params])[:, None]
        rows_ZV = truncate_(rows_ZV / temperature_Z1, [sequences[row] for row in drawn])
        uniform_Z = rows_ZV.new_tensor(
            [uniform(sequences[row].seed, sequences[row].num_output) for row in drawn],
            dtype=torch.float64,
        )
        token_Z[drawn] = draw(rows_ZV, uniform_Z)
    token_Z[~best_Z.isfinite()] = NONE_ALLOWED
    token_Z[~is_finite_Z] = NOT_FINITE
    return token_Z.tolist()


def adjust_(logits_V: Tensor, sequence: Sequence) -> bool:
    """Apply penalties, logit bias and the bar on end tokens to one row, in place; whether any was.

    Repetition (over prompt and output): positive logits are divided by the penalty, negative ones
    multiplied. Presence and frequency count generated tokens only.
    """
    params = sequence.request.params
    if params.uses_penalties:
        _penalize_(logits_V, sequence)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
        logits_V[ids] += logits_V.new_tensor(list(params.logit_bias.values()))
    bars_end = not sequence.may_end and bool(sequence.end_token_ids)
    if bars_end:
        logits_V[torch.tensor(list(sequence.end_token_ids), device=logits_V.device)] = float("-inf")
    return params.uses_penalties or bool(params.logit_bias) or bars_end


def truncate_(logits_ZV: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Set what min_p, top_k and top_p exclude to -inf, row by row; returns `logits_ZV`."""
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        logits_V = logits_ZV[row]
        if params.min_p > 0.0:
            floor = logits_V.max() + float(np.log(params.min_p))
            logits_V[logits_V < floor] = float("-inf")
        if 0 < params.top_k < logits_V.numel():
            kth = logits_V.topk(params.top_k).values[-1]
            logits_V[logits_V < kth] = float("-inf")
        if params.top_p < 1.0:
            _keep_nucleus_(logits_V, params.top_p)
    return logits_ZV


def draw(logits_ZV: Tensor, uniform_Z: Tensor) -> Tensor:
    """Inverse-CDF draw: the first token whose cumulative probability exceeds `uniform`.

    Shapes   logits [Z, V] float32; uniform [Z] float64 in [0, 1); returns [Z] int64.
    """
    cumulative_ZV = logits_ZV.softmax(dim=-1).double().cumsum(dim=-1)
    target_Z1 = (uniform_Z * cumulative_ZV[:, -1])[:, None]
    token_Z = torch.searchsorted(cumulative_ZV, target_Z1, right=True)[:, 0]
    return token_Z.clamp_(max=logits_ZV.shape[-1] - 1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a counter-based generator: it depends on seed and position only."""
    generator = np.random.Philox(key=seed & 0xFFFF_FFFF_FFFF_FFFF, counter=position)
    return float(np.random.Generator(generator).random())


def token_logprobs(logits_ZV: Tensor, token_ids: Seq[int], num_top: Seq[int]) -> list[TokenLogprob]:
    """Log-probability, rank (1 is best) and the `num_top` best alternatives of each row's token.

    Taken from the logits as given, so from a copy that `sample` has not changed.
    Shapes   logits [Z, V] float32; one token id and one number per row.
    """
    logprob_ZV = logits_ZV.log_softmax(dim=-1)
    token_Z1 = torch.tensor(token_ids, device=logits_ZV.device)[:, None]
    chosen_Z1 = logprob_ZV.gather(1, token_Z1)
    rank_Z = (logprob_ZV > chosen_Z1).sum(dim=-1) + 1
    top = logprob_ZV.topk(min(max(num_top), logits_ZV.shape[-1]), dim=-1)
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, rank, ids, values, count in zip(
            token_ids,
            chosen_Z1[:, 0].tolist(),
            rank_Z.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            num_top,
            strict=True,
        )
    ]


def _is_greedy(sequence: Sequence) -> bool:
    return sequence.request.params.is_greedy


def _penalize_(logits_V: Tensor, sequence: Sequence) -> None:
    params = sequence.request.params
    seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits_V.device)
    values = logits_V[seen]
    penalty = params.repetition_penalty
    logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.num_output:
        output = torch.tensor(sequence.output_token_ids, device=logits_V.device)
        ids, counts = torch.unique(output, return_counts=True)
        logits_V[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _keep_nucleus_(logits_V: Tensor, top_p: float) -> None:
    """Keep the fewest most likely tokens whose probabilities sum to at least `top_p`."""
    values, ids = logits_V.sort(descending=True, stable=True)
    probability = values.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    logits_V[ids[before >= top_p]] = float("-inf")
