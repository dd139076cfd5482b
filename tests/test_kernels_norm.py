"""Adding to the residual stream and normalising it: against torch, and independent of the batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kernel_cases import BACKENDS, THREAD_COUNTS, use_all_threads
from loraswarm.kernels import cpu, reference
from tolerance import TOLERANCE

DTYPES = list(TOLERANCE)
EPS = 1e-6
SHAPES = [(1, 1), (1, 896), (3, 7), (7, 133), (33, 64), (133, 300), (2, 9000)]


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    use_all_threads(monkeypatch)


def make(num_tokens, size, dtype, seed=0):
    """x, delta and weight."""
    generator = torch.Generator().manual_seed(seed)
    x_TD, delta_TD = torch.randn(2, num_tokens, size, generator=generator).to(dtype).unbind()
    return x_TD, delta_TD, torch.randn(size, generator=generator).to(dtype)


def by_torch_(x_TD, delta_TD, weight_D):
    """What torch makes of it, rounding after each operation; x is changed."""
    if delta_TD is not None:
        x_TD.add_(delta_TD)
    normed_TD = F.rms_norm(x_TD, x_TD.shape[-1:], None, EPS)
    return normed_TD if weight_D is None else normed_TD.mul_(weight_D)


def assert_bits_close(actual, expected):
    """The order of a sum may turn a rounding here and there, and no more.

    A turned rounding of the quotient is at most two steps of the product.
    """
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)
        return
    steps = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert steps.max() <= 2
    assert (steps > 0).sum() <= 1 + steps.numel() // 1000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("has_weight", [True, False])
def test_sum_and_norm_equal_torch(backend, dtype, shape, has_delta, has_weight):
    x_TD, delta_TD, weight_D = make(*shape, dtype)
    delta_TD = delta_TD if has_delta else None
    weight_D = weight_D if has_weight else None
    expected_x = x_TD.clone()
    expected = by_torch_(expected_x, delta_TD, weight_D)
    normed_TD = backend.add_rms_norm_(x_TD, delta_TD, weight_D, EPS)
    assert torch.equal(x_TD, expected_x)
    assert_bits_close(normed_TD, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[], [0], [132], [0, 1, 5, 64, 131, 132], list(range(133))])
def test_with_rows_only_these_are_added_to_and_returned(backend, dtype, rows):
    x_TD, delta_TD, weight_D = make(133, 65, dtype)
    before = x_TD.clone()
    whole_x = x_TD.clone()
    whole = backend.add_rms_norm_(whole_x, delta_TD, weight_D, EPS)
    normed_ZD = backend.add_rms_norm_(x_TD, delta_TD, weight_D, EPS, torch.tensor(rows).long())
    assert torch.equal(normed_ZD, whole[rows])
    others = [row for row in range(133) if row not in rows]
    assert torch.equal(x_TD[rows], whole_x[rows])
    assert torch.equal(x_TD[others], before[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_quotient_and_product_are_rounded_each(backend):
    x_TD, delta_TD, weight_D = make(64, 896, torch.bfloat16)
    sum_TD = x_TD.float() + delta_TD.float()
    rounded_once = (F.rms_norm(sum_TD, (896,), None, EPS) * weight_D.float()).bfloat16()
    normed_TD = backend.add_rms_norm_(x_TD, delta_TD, weight_D, EPS)
    assert (normed_TD != rounded_once).float().mean() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_added_to_the_mean_square(backend):
    x_TD = torch.full((3, 7), 1e-3)
    normed_TD = backend.add_rms_norm_(x_TD, None, None, 1e-6)
    torch.testing.assert_close(normed_TD, torch.full((3, 7), math.sqrt(0.5)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_in_memory(backend, dtype):
    x_TD, delta_TD, weight_D = make(7, 133, dtype)
    wide_x, wide_delta = torch.full((2, 7, 150), math.nan, dtype=dtype).unbind()
    wide_x[:, 3:136], wide_delta[:, 9:142] = x_TD, delta_TD
    expected = backend.add_rms_norm_(x_TD, delta_TD, weight_D, EPS)
    normed_TD = backend.add_rms_norm_(wide_x[:, 3:136], wide_delta[:, 9:142], weight_D, EPS)
    assert torch.equal(normed_TD, expected)
    assert torch.equal(wide_x[:, 3:136], x_TD)
    assert wide_x[:, :3].isnan().all()
    assert wide_x[:, 136:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_leaves_the_others_alone(backend, value):
    x_TD, delta_TD, weight_D = make(7, 133, torch.bfloat16)
    expected = backend.add_rms_norm_(x_TD.clone(), delta_TD, weight_D, EPS)
    delta_TD[3, 100] = value
    normed_TD = backend.add_rms_norm_(x_TD, delta_TD, weight_D, EPS)
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(normed_TD[others], expected[others])
    assert normed_TD[3, 100].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_nor_on_the_threads(dtype):
    x_TD, delta_TD, weight_D = make(133, 900, dtype)
    results = []
    for count in THREAD_COUNTS:
        cpu.set_num_threads(count)
        results.append(cpu.add_rms_norm_(x_TD.clone(), delta_TD, weight_D, EPS))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    for row in (0, 8, 9, 132):
        one = slice(row, row + 1)
        alone = cpu.add_rms_norm_(x_TD[one].clone(), delta_TD[one], weight_D, EPS)
        assert torch.equal(alone, results[0][one])


def test_a_recorded_norm_reads_what_was_recorded_before_it():
    x_TD, delta_TD, weight_D = make(7, 134, torch.bfloat16)
    expected_x = x_TD.clone()
    expected = reference.silu_multiply(
        reference.add_rms_norm_(expected_x, delta_TD, weight_D, EPS, torch.tensor([1, 4]))
    )
    before = x_TD.clone()
    with cpu.recording():
        rows_Z = torch.tensor([1, 4])
        gated_ZF = cpu.silu_multiply(cpu.add_rms_norm_(x_TD, delta_TD, weight_D, EPS, rows_Z))
        del rows_Z
        assert torch.equal(x_TD, before)
    assert torch.equal(x_TD, expected_x)
    assert_bits_close(gated_ZF, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x_TD", torch.zeros(7)),
        ("x_TD", torch.zeros(133, 7).T),
        ("delta_TD", torch.zeros(6, 133)),
        ("delta_TD", torch.zeros(7, 133, dtype=torch.bfloat16)),
        ("delta_TD", torch.zeros(133, 7).T),
        ("weight_D", torch.zeros(132)),
        ("weight_D", torch.zeros(133, dtype=torch.float64)),
        ("weight_D", torch.zeros(266)[::2]),
        ("rows_Z", torch.tensor([0], dtype=torch.int32)),
        ("rows_Z", torch.tensor([[0]])),
        ("rows_Z", torch.tensor([-1, 2])),
        ("rows_Z", torch.tensor([2, 7])),
        ("rows_Z", torch.tensor([3, 1])),
        ("rows_Z", torch.tensor([3, 3])),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(backend, name, value):
    x_TD, delta_TD, weight_D = make(7, 133, torch.float32)
    arguments = {"x_TD": x_TD, "delta_TD": delta_TD, "weight_D": weight_D, "rows_Z": None}
    before = x_TD.clone()
    with pytest.raises(ValueError, match=name):
        backend.add_rms_norm_(**(arguments | {name: value}), eps=EPS)
    assert torch.equal(x_TD, before)


def test_a_type_that_the_cpu_kernels_do_not_know_is_named():
    with pytest.raises(ValueError, match=r"x_TD is torch\.float64"):
        cpu.add_rms_norm_(torch.zeros(1, 3, dtype=torch.float64), None, None, EPS)
