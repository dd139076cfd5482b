"""Draws one token for each row of logits, by the row's own parameters and its own randomness.

Pure functions. A row's result depends on its logits, its tokens, its parameters, its seed and its
position only, not on what else is in the batch. Called by the engine after the model.
Legend: Z rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from loraswarm.core.events import TokenLogprob
from loraswarm.core.sequence import Sequence
from loraswarm.engine.fetch import Fetch
from loraswarm.engine.penalties import adjust_, adjust_rows_, is_adjusted
from loraswarm.engine.row_blocks import best_tokens, draw
from loraswarm.engine.truncation import truncate_

__all__ = [
    "NONE_ALLOWED",
    "NOT_FINITE",
    "Drawn",
    "adjust_",
    "draw",
    "draw_rows",
    "draws_at_once",
    "sample",
    "token_logprobs",
    "truncate_",
    "uniform",
]

NOT_FINITE = -1
NONE_ALLOWED = -2


class Drawn:
    """One token id per row: `token_Z` [Z] int64 where the logits are, and on the host."""

    def __init__(self, token_Z: Tensor, best_Z: Tensor, allowed_Z: Tensor) -> None:
        """`best` and `allowed` [Z] float32 are the largest logits of each row before and after its
        own parameters have changed them."""
        self.token_Z = token_Z
        self._fetch = Fetch(token_Z, best_Z, allowed_Z)

    def wait(self) -> list[int]:
        """The token ids; NOT_FINITE where the model's logits are NaN or infinite, NONE_ALLOWED
        where the row's own parameters leave no token to choose."""
        return [_token_or_failure(*row) for row in zip(*self._fetch.wait(), strict=True)]


def sample(logits_ZV: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """`draw_rows`, waited for."""
    return draw_rows(logits_ZV, sequences).wait()


def draws_at_once(sequences: Seq[Sequence]) -> bool:
    """Whether `draw_rows` waits for no device, and its result is the same whether or not each
    sequence's last token is known yet."""
    return all(_is_greedy(sequence) and not is_adjusted(sequence) for sequence in sequences)


def draw_rows(logits_ZV: Tensor, sequences: Seq[Sequence]) -> Drawn:
    """Draw one token for each row.

    Order    repetition, presence and frequency penalties, logit bias, end tokens barred before
             min_tokens, temperature, min_p, top_k, top_p; temperature 0 takes the likeliest token.
    Shapes   logits [Z, V] float32, changed in place.
    """
    best_Z, token_Z = best_tokens(logits_ZV)
    allowed_Z = best_Z
    adjusted = adjust_rows_(logits_ZV, sequences)
    if adjusted:
        rows_ZV = logits_ZV if len(adjusted) == len(sequences) else logits_ZV[adjusted]
        allowed_Z = best_Z.clone()
        allowed_Z[adjusted], token_Z[adjusted] = best_tokens(rows_ZV)
    drawn = [row for row, sequence in enumerate(sequences) if not _is_greedy(sequence)]
    if drawn:
        params = [sequences[row].request.params for row in drawn]
        rows_ZV = logits_ZV if len(drawn) == len(sequences) else logits_ZV[drawn]
        temperature_Z1 = rows_ZV.new_tensor([p.temperature for p in params])[:, None]
        rows_ZV = truncate_(rows_ZV.div_(temperature_Z1), [sequences[row] for row in drawn])
        uniform_Z = rows_ZV.new_tensor(
            [uniform(sequences[row].seed, sequences[row].num_output) for row in drawn],
            dtype=torch.float64,
        )
        token_Z[drawn] = draw(rows_ZV, uniform_Z)
    return Drawn(token_Z, best_Z, allowed_Z)


def _token_or_failure(token: int, best: float, best_allowed: float) -> int:
    if not isfinite(best):
        return NOT_FINITE
    return token if isfinite(best_allowed) else NONE_ALLOWED


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
