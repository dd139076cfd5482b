"""Sampling block by block equals the plain definitions on rows of many sizes, ties and limits."""

from __future__ import annotations

import math

import pytest
import torch

from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.sequence import Sequence
from loraswarm.engine import row_blocks, truncation
from loraswarm.engine.penalties import adjust_, adjust_rows_
from loraswarm.engine.row_blocks import BLOCK_TOKENS, best_tokens, draw
from loraswarm.engine.sampler import NONE_ALLOWED, sample
from loraswarm.engine.truncation import truncate_

VOCAB_SIZES = [1, 3, 127, 128, 129, 133, 1000, 8192, 9001]
LIMITS = [
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 64},
    {"top_k": 128},
    {"top_k": 129},
    {"top_k": 500},
    {"top_k": 500, "top_p": 0.5},
    {"top_k": 50, "top_p": 0.8},
    {"min_p": 0.05},
    {"min_p": 1e-3, "top_k": 500},
    {"min_p": 0.02, "top_k": 20, "top_p": 0.7},
    {},
]


def make(prompt=(1, 2), output=(), seed=0, ends=(), **params):
    request = Request(
        request_id="r", prompt_token_ids=prompt, params=SamplingParams(max_tokens=99, **params)
    )
    sequence = Sequence(request, (), seed, 99, frozenset(ends))
    sequence.token_ids += output
    return sequence


def logits(num_rows, vocab_size, spread, seed=0):
    """Rounded as a bfloat16 model's are: many tokens are equally likely."""
    generator = torch.Generator().manual_seed(seed)
    rows = spread * torch.randn(num_rows, vocab_size, generator=generator)
    return rows.bfloat16().float()


def plainly_truncated(row, params):
    row = row.clone()
    if params.min_p > 0.0:
        row[row < row.max() + math.log(params.min_p)] = -math.inf
    if 0 < params.top_k < row.numel():
        row[row < row.topk(params.top_k).values[-1]] = -math.inf
    if params.top_p < 1.0:
        values, ids = row.sort(descending=True, stable=True)
        probability = values.softmax(dim=-1)
        row[ids[probability.cumsum(dim=-1) - probability >= params.top_p]] = -math.inf
    return row


def plainly_drawn(rows, uniforms):
    cumulative = rows.softmax(dim=-1).double().cumsum(dim=-1)
    target = (uniforms * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=rows.shape[1] - 1)


@pytest.fixture
def sorted_rows(monkeypatch):
    """The rows that truncation treats one by one, as they come."""
    rows = []
    one_by_one = truncation._truncate_row_

    def noted(row, params):
        rows.append(params)
        one_by_one(row, params)

    monkeypatch.setattr(truncation, "_truncate_row_", noted)
    return rows


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_every_limit_keeps_what_the_plain_definition_keeps(vocab_size, spread):
    rows = logits(len(LIMITS), vocab_size, spread)
    sequences = [make(**limit) for limit in LIMITS]
    expected = [
        plainly_truncated(row, sequence.request.params)
        for row, sequence in zip(rows, sequences, strict=True)
    ]
    assert torch.equal(truncate_(rows.clone(), sequences), torch.stack(expected))
    for row, sequence, alone in zip(rows, sequences, expected, strict=True):
        assert torch.equal(truncate_(row[None].clone(), [sequence])[0], alone)


def test_rows_that_keep_few_tokens_are_not_sorted(sorted_rows):
    rows = logits(3, 9001, 6.0)
    limits = [{"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}]
    truncate_(rows, [make(**limit) for limit in limits])
    assert sorted_rows == []
    flat = logits(1, 9001, 0.1)
    truncate_(flat, [make(top_p=0.9)])
    assert len(sorted_rows) == 1
    assert 6000 < flat.isfinite().sum() < 9000


@pytest.mark.parametrize("limit", [{"top_k": 68}, {"top_k": 80}, {"top_p": 0.97}, {"min_p": 0.5}])
def test_tokens_kept_may_lie_in_more_blocks_than_are_looked_at(limit):
    rows = torch.linspace(-9.0, -8.0, 9001)[None].clone()
    rows[0, ::BLOCK_TOKENS] = torch.linspace(12.0, 11.5, 71)
    sequence = make(**limit)
    expected = plainly_truncated(rows[0], sequence.request.params)
    assert expected.isfinite().sum() > truncation.NUM_BLOCKS - 1
    assert torch.equal(truncate_(rows, [sequence])[0], expected)


@pytest.mark.parametrize("top_p", [0.1, 0.5])
@pytest.mark.parametrize("vocab_size", [100, 9001])
def test_of_equally_likely_tokens_top_p_keeps_the_lowest_ids(vocab_size, top_p):
    rows = torch.full((1, vocab_size), -50.0)
    likely = list(range(5, vocab_size, vocab_size // 10))[:10]
    rows[0, likely] = 3.0
    kept = truncate_(rows, [make(top_p=top_p)])[0].isfinite().nonzero()[:, 0].tolist()
    assert kept == likely[: round(10 * top_p)]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_draws_equal_those_from_one_sum_in_float64(vocab_size, spread):
    rows = logits(33, vocab_size, spread)
    rows[::2] = torch.where(rows[::2] < spread, -math.inf, rows[::2])
    rows[:, -1] = spread
    uniforms = torch.rand(33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[:3] = torch.tensor([0.0, 1.0 - 2**-53, 0.5])
    assert torch.equal(draw(rows, uniforms), plainly_drawn(rows, uniforms))


def test_draws_at_the_edges_of_tokens_and_blocks_are_exact(monkeypatch):
    row = torch.zeros(1, 4 * BLOCK_TOKENS)
    edges = torch.arange(4 * BLOCK_TOKENS, dtype=torch.float64) / (4 * BLOCK_TOKENS)
    rows = row.expand(len(edges), -1)
    assert torch.equal(draw(rows, edges), torch.arange(4 * BLOCK_TOKENS))
    just_below = (edges - 1e-12).clamp(min=0.0)
    assert draw(rows, just_below).tolist() == [0, *range(4 * BLOCK_TOKENS - 1)]
    monkeypatch.setattr(row_blocks, "_draw_exactly", None)
    between = edges + 0.5 / (4 * BLOCK_TOKENS)
    assert torch.equal(draw(rows, between), torch.arange(4 * BLOCK_TOKENS))


def test_float32_sums_of_blocks_do_not_decide_a_draw_at_an_edge():
    row = logits(1, 9001, 1.0)
    cumulative = row[0].softmax(dim=-1).double().cumsum(dim=-1)
    uniforms = cumulative[:-1:50] / cumulative[-1]
    for shift in (0.0, -1e-9, 1e-9):
        rows = row.expand(len(uniforms), -1)
        assert torch.equal(draw(rows, uniforms + shift), plainly_drawn(rows, uniforms + shift))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("num_rows", [1, 2, 33])
def test_the_best_token_is_the_first_of_the_likeliest(vocab_size, num_rows):
    rows = logits(num_rows, vocab_size, 0.01)
    best, token = best_tokens(rows)
    assert torch.equal(best, rows.amax(dim=-1))
    assert token.tolist() == [(row == row.max()).nonzero()[0, 0].item() for row in rows]


@pytest.mark.parametrize("place", [0, 127, 128, 299])
def test_nan_is_better_than_any_number(place):
    rows = torch.zeros(3, 300)
    rows[1, place] = math.nan
    rows[1, 5] = math.inf
    best, token = best_tokens(rows)
    assert best.isnan().tolist() == [False, True, False]
    assert token.tolist() == [0, place, 0]
    best, token = best_tokens(rows[1:2])
    assert best.isnan().tolist() == [True]
    assert token.tolist() == [place]


def test_rows_adjusted_together_equal_each_alone():
    sequences = [
        make(prompt=(1, 2, 2), output=(5, 5, 9), repetition_penalty=1.5),
        make(),
        make(output=(7, 8, 7), presence_penalty=0.5),
        make(output=(7, 8, 7), frequency_penalty=-0.3, logit_bias={7: 2.0, 132: -100.0}),
        make(ends=(4, 6), min_tokens=3),
        make(prompt=(9,), output=(9, 9), repetition_penalty=0.7, frequency_penalty=0.4),
        make(logit_bias={0: 1.0}),
    ]
    rows = logits(7, 133, 2.0)
    alone = rows.clone()
    adjusted = [index for index, one in enumerate(sequences) if adjust_(alone[index], one)]
    together = rows.clone()
    assert adjust_rows_(together, sequences) == adjusted == [0, 2, 3, 4, 5, 6]
    assert torch.equal(together, alone)
    changed = (together != rows).sum(dim=-1).tolist()
    assert changed == [4, 0, 2, 3, 2, 1, 1]
    assert together[3, 7] == rows[3, 7] + torch.tensor(0.3) * 2 + 2.0


def test_a_row_does_not_depend_on_its_batch():
    rows = torch.cat([logits(15, 9001, 2.0), logits(15, 9001, 6.0)])
    sequences = [make(seed=i, temperature=0.8, **limit) for i, limit in enumerate(2 * LIMITS)]
    together = sample(rows.clone(), sequences)
    alone = [sample(rows[i : i + 1].clone(), [s])[0] for i, s in enumerate(sequences)]
    assert together == alone
    assert len(set(together)) > 15


@pytest.mark.parametrize("limit", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {}])
def test_a_drawn_row_that_bars_every_token_has_none(limit):
    rows = torch.cat([torch.full((1, 300), -math.inf), logits(1, 300, 2.0)])
    rows[0, 7] = 1.0
    barred = make(ends=(7,), min_tokens=2, **limit)
    first, second = sample(rows, [barred, make(**limit)])
    assert first == NONE_ALLOWED
    assert 0 <= second < 300
