"""Sampling: each parameter's meaning, and independence from the rest of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.sequence import Sequence
from loraswarm.engine.sampler import (
    NONE_ALLOWED,
    NOT_FINITE,
    adjust_,
    draw,
    sample,
    token_logprobs,
    truncate_,
    uniform,
)


def make(prompt=(1, 2, 3), output=(), seed=0, ends=(), **params):
    request = Request(
        request_id="r", prompt_token_ids=prompt, params=SamplingParams(max_tokens=99, **params)
    )
    sequence = Sequence(request, (), seed, 99, frozenset(ends))
    sequence.token_ids += output
    return sequence


def logits(*values):
    return torch.tensor([values], dtype=torch.float32)


def kept(row, sequence):
    """Tokens that truncation leaves."""
    return torch.isfinite(truncate_(row, [sequence]))[0].nonzero()[:, 0].tolist()


def test_greedy_takes_the_likeliest_token():
    assert sample(logits(0.0, 3.0, 1.0), [make(temperature=0)]) == [1]


def test_greedy_and_drawn_rows_in_one_batch_equal_each_alone():
    torch.manual_seed(0)
    rows = torch.randn(5, 133)
    sequences = [
        make(temperature=0),
        make(seed=1),
        make(seed=2, temperature=0.7, top_p=0.8),
        make(seed=3, top_k=5),
        make(seed=4, min_p=0.1, repetition_penalty=1.3),
    ]
    together = sample(rows.clone(), sequences)
    alone = [sample(rows[i : i + 1].clone(), [s])[0] for i, s in enumerate(sequences)]
    reverse = sample(rows.flip(0).clone(), sequences[::-1])[::-1]
    assert together == alone == reverse


def test_drawn_frequencies_follow_the_softmax_at_the_temperature():
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    row = (2.0 * probability.log())[None]
    draws = [sample(row.clone(), [make(seed=s, temperature=2.0)])[0] for s in range(4000)]
    counts = torch.bincount(torch.tensor(draws), minlength=4)
    chi_square = ((counts - 4000 * probability) ** 2 / (4000 * probability)).sum()
    assert chi_square < 16.3  # 0.1 % quantile for 3 degrees of freedom


def test_uniform_depends_on_seed_and_position_and_fills_the_unit_interval():
    values = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(values)) == len(values)
    assert all(0.0 <= value < 1.0 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.03
    assert uniform(7, 3) == uniform(7, 3)
    assert uniform(-1, 0) != uniform(1, 0)


def test_draw_never_takes_a_token_of_probability_zero():
    row = logits(-math.inf, 0.0, -math.inf, 0.0, -math.inf)
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(row.expand(5, -1), edges).tolist() == [1, 1, 3, 3, 3]


def test_top_k_keeps_the_k_likeliest():
    assert kept(logits(1.0, 4.0, 3.0, 2.0), make(top_k=2)) == [1, 2]
    assert kept(logits(1.0, 4.0, 3.0, 2.0), make(top_k=-1)) == [0, 1, 2, 3]


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    row = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert kept(row.clone(), make(top_p=0.5)) == [0]
    assert kept(row.clone(), make(top_p=0.51)) == [0, 1]
    assert kept(row.clone(), make(top_p=0.96)) == [0, 1, 2, 3]
    assert kept(row.clone(), make(top_p=0.01)) == [0]


def test_min_p_is_relative_to_the_likeliest():
    row = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert kept(row.clone(), make(min_p=0.31)) == [0, 1]


def test_repetition_penalty_covers_prompt_and_output():
    row = logits(2.0, 2.0, -2.0, 2.0)[0]
    adjust_(row, make(prompt=(1,), output=(2,), repetition_penalty=2.0))
    assert row.tolist() == [2.0, 1.0, -4.0, 2.0]


def test_presence_and_frequency_penalties_count_output_only():
    row = logits(0.0, 0.0, 0.0, 0.0)[0]
    adjust_(row, make(prompt=(1,), output=(2, 2, 3), presence_penalty=0.5, frequency_penalty=0.25))
    assert row.tolist() == [0.0, 0.0, -1.0, -0.75]


def test_logit_bias_is_added():
    row = logits(0.0, 0.0, 0.0)[0]
    adjust_(row, make(logit_bias={1: 5.0, 2: -100.0}))
    assert row.tolist() == [0.0, 5.0, -100.0]


def test_end_tokens_are_barred_until_min_tokens():
    row = logits(0.0, 9.0)
    assert sample(row.clone(), [make(ends=(1,), min_tokens=2, temperature=0)]) == [0]
    reached = make(ends=(1,), min_tokens=2, output=(5, 5), temperature=0)
    assert sample(row.clone(), [reached]) == [1]


def test_a_temperature_too_small_to_divide_by_is_greedy():
    assert sample(logits(0.0, 3.0, 1.0), [make(temperature=1e-40)]) == [1]


def test_a_row_without_an_allowed_token_is_told_from_one_that_is_not_finite():
    barred = make(ends=(0, 1), min_tokens=2, temperature=0)
    assert sample(logits(0.0, 9.0), [barred]) == [NONE_ALLOWED]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nan_is_reported_and_others_are_not(temperature):
    rows = torch.stack([torch.tensor([0.0, math.nan, 1.0]), torch.tensor([0.0, 9.0, 1.0])])
    sequences = [make(temperature=temperature), make(temperature=0)]
    assert sample(rows, sequences) == [NOT_FINITE, 1]


def test_logprobs_are_of_the_softmax_with_rank_and_alternatives():
    row = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    (found,) = token_logprobs(row + 3.0, [2], [2])
    assert found.token_id == 2
    assert found.rank == 3
    assert found.logprob == pytest.approx(math.log(0.15), abs=1e-5)
    assert [token for token, _ in found.top] == [0, 1]
    assert found.top[1][1] == pytest.approx(math.log(0.3), abs=1e-5)
