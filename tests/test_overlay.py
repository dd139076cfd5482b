"""Rows of a matrix cut into blocks of a pool equal the same rows of the plain matrix."""

from __future__ import annotations

import pytest
import torch

from loraswarm.kernels.overlay import PagedRows, gather_rows, multiply_rows, row_blocks
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
SIZES = [(1, 1, 1), (7, 3, 7), (7, 3, 10), (133, 37, 20), (133, 37, 133), (16, 1, 3), (3, 133, 1)]


def paged(num_rows, width, rows_per_block, dtype):
    """A random matrix, a pool that holds it in shuffled blocks among NaN, and where it lies."""
    generator = torch.Generator().manual_seed(0)
    matrix_NW = torch.randn(num_rows, width, generator=generator).to(dtype)
    blocks = matrix_NW.split(rows_per_block)
    block_elements = rows_per_block * width + 5
    pool = torch.full(((len(blocks) + 2) * block_elements,), float("nan"), dtype=dtype)
    places = torch.randperm(len(blocks) + 2, generator=generator)[: len(blocks)]
    offsets = places * block_elements + 3
    for block, offset in zip(blocks, offsets.tolist(), strict=True):
        pool[offset : offset + block.numel()] = block.flatten()
    rows = PagedRows(offsets, tuple(offsets.tolist()), rows_per_block, num_rows, width)
    return matrix_NW, pool, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_gathered_rows_have_the_bits_of_the_matrix(sizes, dtype):
    matrix_NW, pool, rows = paged(*sizes, dtype)
    ids_T = torch.randint(sizes[0], (33,), generator=torch.Generator().manual_seed(1))
    ids_T[0], ids_T[1] = sizes[0] - 1, 0
    assert torch.equal(gather_rows(pool, rows, ids_T), matrix_NW[ids_T])


def test_gathered_rows_are_a_copy():
    matrix_NW, pool, rows = paged(7, 3, 2, torch.bfloat16)
    gathered = gather_rows(pool, rows, torch.arange(7))
    pool.zero_()
    assert torch.equal(gathered, matrix_NW)


def test_no_ids_gather_no_rows():
    _, pool, rows = paged(7, 3, 2, torch.bfloat16)
    gathered = gather_rows(pool, rows, torch.empty(0, dtype=torch.int64))
    assert gathered.shape == (0, 3)
    assert gathered.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_products_equal_those_of_the_matrix(num_tokens, sizes, dtype):
    matrix_NW, pool, rows = paged(*sizes, dtype)
    x_TI = torch.randn(num_tokens, sizes[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    product_TN = multiply_rows(x_TI, pool, rows)
    assert product_TN.dtype == dtype
    assert_close(product_TN, x_TI.float() @ matrix_NW.float().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_are_views_of_the_pool_that_make_up_the_matrix(sizes, dtype):
    matrix_NW, pool, rows = paged(*sizes, dtype)
    blocks = row_blocks(pool, rows)
    assert torch.equal(torch.cat(blocks), matrix_NW)
    blocks[-1][-1, -1] = 7.0
    assert (pool == 7.0).sum() == 1
    last_id = torch.tensor([sizes[0] - 1])
    assert gather_rows(pool, rows, last_id)[0, -1] == 7.0
