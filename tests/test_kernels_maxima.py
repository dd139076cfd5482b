"""Maxima of blocks of logits equal torch's."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import THREAD_COUNTS, use_all_threads
from loraswarm.kernels import cpu
from loraswarm.kernels.cpu import jit


def plain(rows_ZV: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([block.amax(dim=1, keepdim=True) for block in rows_ZV.split(size, dim=1)], 1)


@pytest.fixture(params=THREAD_COUNTS)
def all_threads(request, monkeypatch):
    use_all_threads(monkeypatch)
    monkeypatch.setattr(jit.threads, "_count", request.param)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("num_rows", [1, 3, 33])
@pytest.mark.parametrize("width", [1, 31, 32, 128, 133, 1000, 40_001])
@pytest.mark.parametrize("size", [1, 33, 128])
def test_maxima_equal_torch(num_rows, width, size):
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(num_rows, width + 9, generator=generator) - 4.0
    rows_ZV = wide[:, 2 : width + 2]
    rows_ZV[0, width // 2] = float("-inf")
    rows_ZV[-1, width - 1] = float("inf")
    assert torch.equal(cpu.block_maxima(rows_ZV, size), plain(rows_ZV, size))


@pytest.mark.parametrize("place", [0, 31, 127, 128, 130, 132])
@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_one_that_is_not_a_number_is_its_blocks_maximum_alone(place, value):
    rows_ZV = torch.randn(3, 133, generator=torch.Generator().manual_seed(0))
    expected = plain(rows_ZV, 128)
    rows_ZV[1, place] = value
    rows_ZV[1, (place + 1) % 133] = float("inf")
    maxima = cpu.block_maxima(rows_ZV, 128)
    assert maxima[1, place // 128].isnan()
    assert torch.equal(maxima[[0, 2]], expected[[0, 2]])
    assert maxima.isnan().sum() == 1


def test_rows_of_nothing_but_the_lowest_have_it_as_maximum():
    rows_ZV = torch.full((2, 133), float("-inf"))
    assert torch.equal(cpu.block_maxima(rows_ZV, 128), torch.full((2, 2), float("-inf")))


def test_no_rows_have_no_maxima():
    assert cpu.block_maxima(torch.empty(0, 133), 128).shape == (0, 2)


@pytest.mark.parametrize(
    ("rows", "size", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), 1, "rows_ZV"),
        (torch.zeros(3), 1, "rows_ZV"),
        (torch.zeros(3, 2).T, 1, "rows_ZV"),
        (torch.zeros(2, 3), 0, "size"),
    ],
)
def test_wrong_arguments_are_named(rows, size, message):
    with pytest.raises(ValueError, match=message):
        cpu.block_maxima(rows, size)
