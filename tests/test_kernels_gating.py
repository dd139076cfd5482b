"""silu(gate) * up against torch: every value of the 16-bit types, and independent of the batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kernel_cases import BACKENDS, THREAD_COUNTS, use_all_threads
from loraswarm.kernels import cpu
from tolerance import TOLERANCE

DTYPES = list(TOLERANCE)
SHAPES = [(1, 1), (1, 9000), (3, 7), (7, 133), (33, 64), (133, 300)]


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    use_all_threads(monkeypatch)


def make(num_tokens, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (4.0 * torch.randn(num_tokens, 2 * size, generator=generator)).to(dtype)


def by_torch(gate_up_TF2):
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


def assert_close(actual, expected):
    """16-bit types: the same bits; float32: some of its last bits."""
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-37, equal_nan=True)
    else:
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_product_equals_torch(backend, dtype, shape):
    gate_up_TF2 = make(*shape, dtype)
    before = gate_up_TF2.clone()
    gated_TF = backend.silu_multiply(gate_up_TF2)
    assert gated_TF.shape == shape
    assert_close(gated_TF, by_torch(gate_up_TF2))
    assert torch.equal(gate_up_TF2, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_of_every_16_bit_value_equals_torch(dtype):
    every_T1 = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[:, None]
    gate_up_TF2 = torch.cat([every_T1, torch.ones_like(every_T1)], dim=1)
    gated_T1 = cpu.silu_multiply(gate_up_TF2.view(256, 256, 2).transpose(1, 2).reshape(256, 512))
    assert_close(gated_T1.view(-1, 1), F.silu(every_T1))


def test_silu_of_float32_equals_that_of_float64():
    gate_F = torch.linspace(-86.0, 90.0, 100_003)
    gated_1F = cpu.silu_multiply(torch.cat([gate_F, torch.ones_like(gate_F)])[None])
    expected_F = F.silu(gate_F.double())
    torch.testing.assert_close(gated_1F[0].double(), expected_F, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_behaves_as_in_torch(dtype):
    gates = [math.inf, -math.inf, math.nan, -0.0, 0.0, -88.5, -89.0, -200.0, 3e4, -3e4, 1.0]
    ups = [1.0, -1.0, 0.0, math.inf, math.nan]
    pairs_T2 = torch.cartesian_prod(torch.tensor(gates), torch.tensor(ups)).to(dtype)
    gated_T1 = cpu.silu_multiply(pairs_T2)
    expected_T1 = by_torch(pairs_T2)
    assert_close(gated_T1, expected_T1)
    numbers = ~expected_T1.isnan()
    assert torch.equal(gated_T1[numbers].signbit(), expected_T1[numbers].signbit())


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_is_rounded_before_the_product(backend):
    gate_up_TF2 = make(33, 64, torch.bfloat16)
    rounded_once = by_torch(gate_up_TF2.float()).bfloat16()
    assert (backend.silu_multiply(gate_up_TF2) != rounded_once).float().mean() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_apart_in_memory(backend):
    gate_up_TF2 = make(7, 133, torch.bfloat16)
    wide = torch.full((7, 300), math.nan, dtype=torch.bfloat16)
    wide[:, 5:271] = gate_up_TF2
    assert torch.equal(backend.silu_multiply(wide[:, 5:271]), backend.silu_multiply(gate_up_TF2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_nor_on_the_threads(dtype):
    gate_up_TF2 = make(133, 300, dtype)
    results = []
    for count in THREAD_COUNTS:
        cpu.set_num_threads(count)
        results.append(cpu.silu_multiply(gate_up_TF2))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    for row in (0, 26, 27, 132):
        alone = cpu.silu_multiply(gate_up_TF2[row : row + 1])
        assert torch.equal(alone[0], results[0][row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_tokens_has_no_rows(backend):
    assert backend.silu_multiply(torch.zeros(0, 266)).shape == (0, 133)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate_up", [torch.zeros(4), torch.zeros(3, 7), torch.zeros(4, 3).T])
def test_wrong_shapes_are_named(backend, gate_up):
    with pytest.raises(ValueError, match="gate_up_TF2"):
        backend.silu_multiply(gate_up)


def test_a_type_that_the_cpu_kernels_do_not_know_is_named():
    with pytest.raises(ValueError, match=r"gate_up_TF2 is torch\.float64"):
        cpu.silu_multiply(torch.zeros(1, 4, dtype=torch.float64))
