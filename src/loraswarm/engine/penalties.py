"""What requests change in their logits before a token is chosen: penalties, bias, barred tokens.

All rows of a batch at once, by the places of the tokens concerned. Called by engine/sampler.
Legend: Z rows, V vocabulary, N places of the flattened logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from loraswarm.core.sequence import Sequence


def adjust_(logits_V: Tensor, sequence: Sequence) -> bool:
    """`adjust_rows_` of one row; whether anything was to be changed."""
    return bool(adjust_rows_(logits_V[None], [sequence]))


def adjust_rows_(logits_ZV: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Apply penalties, logit bias and the bar on end tokens, in place; which rows have any.

    Repetition (over prompt and output): positive logits are divided by the penalty, negative ones
    multiplied. Presence and frequency count generated tokens only.

    Shapes    logits [Z, V] float32, contiguous.
    """
    adjusted = [row for row, sequence in enumerate(sequences) if is_adjusted(sequence)]
    if adjusted:
        some = [(row, sequences[row]) for row in adjusted]
        places = _Places(logits_ZV)
        _penalize_repetition_(places, some)
        _penalize_output_(places, some)
        _add_bias_(places, some)
        ends = [(row, sequence) for row, sequence in some if _bars_end(sequence)]
        place_N, _ = places.of([(row, sorted(sequence.end_token_ids)) for row, sequence in ends])
        places.logits[place_N] = -math.inf
    return adjusted


def is_adjusted(sequence: Sequence) -> bool:
    """Whether the next token's logits are changed. Once they are not, they stay so."""
    params = sequence.request.params
    return params.uses_penalties or bool(params.logit_bias) or _bars_end(sequence)


def _bars_end(sequence: Sequence) -> bool:
    return not sequence.may_end and bool(sequence.end_token_ids)


class _Places:
    """The logits of all rows as one, and where a row's tokens are in it."""

    def __init__(self, logits_ZV: Tensor) -> None:
        self.logits = logits_ZV.view(-1)
        self._vocab_size = logits_ZV.shape[1]

    def of(self, tokens: Seq[tuple[int, Seq[int]]]) -> tuple[Tensor, list[int]]:
        """Places [N] of these tokens of these rows, and how many each row has."""
        return self.to_device(self.on_host(tokens)), [len(ids) for _, ids in tokens]

    def on_host(self, tokens: Seq[tuple[int, Seq[int]]]) -> np.ndarray:
        """Places [N] of these tokens of these rows."""
        places = [row * self._vocab_size + np.array(ids, np.int64) for row, ids in tokens]
        return np.concatenate([np.zeros(0, np.int64), *places])

    def each(self, values: Seq[float], counts: Seq[int]) -> Tensor:
        """Each row's value as often as it has places: [N] float32."""
        return self.to_device(np.repeat(np.array(values, np.float32), counts))

    def to_device(self, array: np.ndarray) -> Tensor:
        """A copy where the logits are; on the CPU the array itself."""
        return torch.from_numpy(array).to(self.logits.device)


def _penalize_repetition_(places: _Places, rows: list[tuple[int, Sequence]]) -> None:
    rows = [item for item in rows if item[1].request.params.repetition_penalty != 1.0]
    place_N, counts = places.of([(row, sequence.token_ids) for row, sequence in rows])
    penalties = [sequence.request.params.repetition_penalty for _, sequence in rows]
    penalty_N = places.each(penalties, counts)
    value_N = places.logits[place_N]
    places.logits[place_N] = torch.where(value_N > 0, value_N / penalty_N, value_N * penalty_N)


def _penalize_output_(places: _Places, rows: list[tuple[int, Sequence]]) -> None:
    rows = [item for item in rows if _counts_output(item[1])]
    tokens = [(row, sequence.output_token_ids) for row, sequence in rows]
    counts = [len(ids) for _, ids in tokens]
    params = [sequence.request.params for _, sequence in rows]
    frequency_N = np.repeat(np.array([own.frequency_penalty for own in params], np.float32), counts)
    presence_N = np.repeat(np.array([own.presence_penalty for own in params], np.float32), counts)
    # Counted before they go to the device: nothing is to be fetched from there.
    place_N, index_N, count_N = np.unique(
        places.on_host(tokens), return_index=True, return_counts=True
    )
    penalty_N = frequency_N[index_N] * count_N.astype(np.float32) + presence_N[index_N]
    places.logits[places.to_device(place_N)] -= places.to_device(penalty_N)


def _counts_output(sequence: Sequence) -> bool:
    params = sequence.request.params
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _add_bias_(places: _Places, rows: list[tuple[int, Sequence]]) -> None:
    biases = [(row, sequence.request.params.logit_bias or {}) for row, sequence in rows]
    place_N, _ = places.of([(row, list(bias)) for row, bias in biases])
    values = [value for _, bias in biases for value in bias.values()]
    places.logits[place_N] += places.logits.new_tensor(values)
