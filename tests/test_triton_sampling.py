"""Sampling on a CUDA device draws what the CPU draws, and the same every time.

Without a device the sums that a device would take are used on the CPU.
"""

from __future__ import annotations

import pytest
import torch

from device_under_test import DEVICE
from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.sequence import Sequence
from loraswarm.engine import row_blocks, truncation
from loraswarm.engine.row_blocks import BLOCK_TOKENS, fixed_order_sums
from loraswarm.engine.sampler import sample

pytestmark = pytest.mark.usefixtures("interpreted_triton")

LENGTHS = [1, 2, 3, 7, 127, 128, 133, 1001]
PARAMS = [
    {"temperature": 0.0},
    {},
    {"temperature": 2.0, "top_p": 0.9},
    {"top_p": 0.9999},
    {"top_k": 7, "top_p": 0.6},
    {"min_p": 1e-3},
    {"top_k": 500, "top_p": 0.99},
]


@pytest.fixture
def sums_of_a_device(monkeypatch):
    """Everywhere but in what a test computes itself."""
    monkeypatch.setattr(row_blocks, "running_sums", fixed_order_sums)
    monkeypatch.setattr(truncation, "running_sums", fixed_order_sums)
    monkeypatch.setattr(truncation, "row_sums", lambda values: fixed_order_sums(values)[..., -1])


def numbers(num_rows, length, dtype):
    """None negative, a third of them zeros, over many orders of magnitude."""
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(num_rows, length, generator=generator).mul(6).exp().to(dtype)
    values[torch.rand(num_rows, length, generator=generator) < 0.3] = 0.0
    return values


def make(seed, **params):
    request = Request(
        request_id="r", prompt_token_ids=(1, 2), params=SamplingParams(max_tokens=99, **params)
    )
    return Sequence(request, (), seed, 99, frozenset())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_sums_in_a_fixed_order_are_sums_that_ascend_where_something_is_added(length, dtype):
    values = numbers(3, length, dtype).to(DEVICE)
    sums = fixed_order_sums(values).cpu()
    exact = values.cpu().double().cumsum(dim=-1)
    error = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(sums.double(), exact, rtol=error, atol=0)
    steps = sums.diff(dim=-1)
    assert (steps >= 0).all()
    assert (steps[values.cpu()[:, 1:] == 0] == 0).all()


def test_sums_of_a_row_are_the_same_bits_in_any_batch():
    values = numbers(7, 1001, torch.float32).to(DEVICE)
    sums = fixed_order_sums(values)
    for row in range(7):
        assert torch.equal(fixed_order_sums(values[row]), sums[row])
        assert torch.equal(fixed_order_sums(values[row : row + 1])[0], sums[row])


def test_a_zero_never_seems_to_add():
    values = torch.tensor([1.0, 2.0**-24, 2.0**-24, 0.0, 2.0**-24, 0.0, 0.0, 1.0])
    plainly = values.clone()
    for reach in (1, 2, 4):
        plainly = torch.cat([plainly[:reach], plainly[reach:] + plainly[:-reach]])
    sums = fixed_order_sums(values.to(DEVICE)).cpu()
    is_zero = values == 0
    assert (plainly.diff()[is_zero[1:]] != 0).any()
    assert (sums.diff()[is_zero[1:]] == 0).all()


@pytest.mark.parametrize("vocab_size", [3, 133, 9001])
def test_a_device_draws_the_tokens_that_the_cpu_draws(vocab_size, sums_of_a_device, monkeypatch):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3.0 * torch.randn(len(PARAMS) * 5, vocab_size, generator=generator)
    logits = logits.bfloat16().float()
    sequences = [make(seed, **PARAMS[seed % len(PARAMS)]) for seed in range(len(logits))]
    on_device = logits.to(DEVICE)
    first = sample(on_device.clone(), sequences)
    assert sample(on_device.clone(), sequences) == first
    alone = [
        sample(on_device[row : row + 1].clone(), [sequence])[0]
        for row, sequence in enumerate(sequences)
    ]
    assert alone == first
    monkeypatch.undo()
    assert sample(logits.clone(), sequences) == first
    assert len(set(first)) > 1


def test_a_draw_at_the_edges_of_tokens_is_the_same_with_the_sums_of_a_device(sums_of_a_device):
    rows = torch.zeros(1, 4 * BLOCK_TOKENS, device=DEVICE).expand(4 * BLOCK_TOKENS, -1)
    edges = torch.arange(4 * BLOCK_TOKENS, dtype=torch.float64, device=DEVICE) / (4 * BLOCK_TOKENS)
    drawn = row_blocks.draw(rows, edges)
    assert torch.equal(drawn.cpu(), torch.arange(4 * BLOCK_TOKENS))
