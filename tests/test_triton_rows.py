"""Triton's kernels of rows: norms and gated products equal torch, best tokens the sampler's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from loraswarm.engine import row_blocks
from loraswarm.kernels.triton.gating import silu_multiply
from loraswarm.kernels.triton.launch import DEVICE_TYPE
from loraswarm.kernels.triton.norm import MAX_COLUMNS, add_rms_norm_, part_of
from loraswarm.kernels.triton.rows import BLOCK_TOKENS, best_tokens
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
HALVES = [torch.bfloat16, torch.float16]
EPS = 1e-6
NORM_SHAPES = [(1, 1), (133, 3), (3, 7), (7, 16), (133, 64), (7, 133), (3, 300), (3, 896)]
LONG_SHAPE = (2, MAX_COLUMNS + 633)
GATED_SHAPES = [(1, 1), (133, 3), (3, 7), (7, 64), (33, 133), (3, 1024), (1, 2500)]
VOCAB_SIZES = [1, 3, 7, 133, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 9001]


pytestmark = pytest.mark.usefixtures("interpreted_triton")


def on_device(tensor):
    """A copy there; None stays None."""
    return tensor if tensor is None else tensor.to(DEVICE_TYPE, copy=True)


def normed(x_TD, delta_TD, weight_D, rows_Z=None, eps=EPS):
    """What `add_rms_norm_` returns, and x after it; the arguments stay as they are."""
    x_TD = on_device(x_TD)
    result = add_rms_norm_(
        x_TD, on_device(delta_TD), on_device(weight_D), eps, rows_Z=on_device(rows_Z)
    )
    return result.cpu(), x_TD.cpu()


def gated(gate_up_TF2):
    return silu_multiply(on_device(gate_up_TF2)).cpu()


def best(rows_ZV):
    best_Z, token_Z = best_tokens(on_device(rows_ZV))
    return best_Z.cpu(), token_Z.cpu()


def make_norm(num_tokens, size, dtype):
    """x, delta and weight."""
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD, delta_TD = torch.randn(2, num_tokens, size, generator=generator).to(dtype).unbind()
    return x_TD, delta_TD, torch.randn(size, generator=generator).to(dtype)


def make_gate_up(num_tokens, size, dtype):
    generator = torch.Generator().manual_seed(num_tokens)
    return (4.0 * torch.randn(num_tokens, 2 * size, generator=generator)).to(dtype)


def make_logits(num_rows, vocab_size):
    """Rounded as a bfloat16 model's are: many tokens are equally likely."""
    generator = torch.Generator().manual_seed(vocab_size)
    return torch.randn(num_rows, vocab_size, generator=generator).bfloat16().float()


def normed_by_torch(x_TD, delta_TD, weight_D):
    """The same two tensors as `normed`, rounded after each operation."""
    sum_TD = x_TD if delta_TD is None else x_TD + delta_TD
    normed_TD = F.rms_norm(sum_TD, sum_TD.shape[-1:], None, EPS)
    return normed_TD if weight_D is None else normed_TD * weight_D, sum_TD


def gated_by_torch(gate_up_TF2):
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def assert_bits_close(actual, expected):
    """Sums in another order and another exp may turn a rounding here and there, and no more.

    A turned rounding of the first result is at most two steps of the product.
    """
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    if actual.dtype == torch.float32:
        assert_close(actual[numbers], expected[numbers], actual.dtype)
        return
    steps = actual.view(torch.int16)[numbers].int() - expected.view(torch.int16)[numbers].int()
    assert steps.abs().max() <= 2
    assert (steps != 0).sum() <= 1 + steps.numel() // 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORM_SHAPES)
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("has_weight", [True, False])
def test_sum_and_norm_equal_torch(dtype, shape, has_delta, has_weight):
    x_TD, delta_TD, weight_D = make_norm(*shape, dtype)
    delta_TD = delta_TD if has_delta else None
    weight_D = weight_D if has_weight else None
    normed_TD, sum_TD = normed(x_TD, delta_TD, weight_D)
    expected_TD, expected_sum_TD = normed_by_torch(x_TD, delta_TD, weight_D)
    assert torch.equal(sum_TD, expected_sum_TD)
    assert torch.equal(sum_TD, x_TD) != has_delta
    assert_bits_close(normed_TD, expected_TD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("rows", [None, [1]])
def test_rows_that_do_not_fit_a_program_are_normalised_too(dtype, has_delta, rows):
    x_TD, delta_TD, weight_D = make_norm(*LONG_SHAPE, dtype)
    delta_TD = delta_TD if has_delta else None
    expected_TD, expected_sum_TD = normed_by_torch(x_TD, delta_TD, weight_D)
    rows_Z = None if rows is None else torch.tensor(rows)
    normed_ZD, sum_TD = normed(x_TD, delta_TD, weight_D, rows_Z)
    assert_bits_close(normed_ZD, expected_TD if rows is None else expected_TD[rows])
    if rows is not None:
        expected_sum_TD = torch.stack([x_TD[0], expected_sum_TD[1]])
    assert torch.equal(sum_TD, expected_sum_TD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [65, 1500])
@pytest.mark.parametrize("rows", [[], [0], [132], [0, 1, 5, 64, 131, 132]])
def test_with_rows_only_these_are_added_to_and_returned(dtype, size, rows):
    x_TD, delta_TD, weight_D = make_norm(133, size, dtype)
    whole_TD, whole_sum_TD = normed(x_TD, delta_TD, weight_D)
    normed_ZD, sum_TD = normed(x_TD, delta_TD, weight_D, torch.tensor(rows).long())
    assert torch.equal(normed_ZD, whole_TD[rows])
    others = [row for row in range(133) if row not in rows]
    assert torch.equal(sum_TD[rows], whole_sum_TD[rows])
    assert torch.equal(sum_TD[others], x_TD[others])


def test_sum_quotient_and_product_are_rounded_each():
    x_TD, delta_TD, weight_D = make_norm(64, 896, torch.bfloat16)
    sum_TD = x_TD.float() + delta_TD.float()
    rounded_once = (F.rms_norm(sum_TD, (896,), None, EPS) * weight_D.float()).bfloat16()
    normed_TD, _ = normed(x_TD, delta_TD, weight_D)
    assert (normed_TD != rounded_once).float().mean() > 0.1


def test_eps_is_added_to_the_mean_square():
    normed_TD, _ = normed(torch.full((3, 7), 1e-3), None, None, eps=1e-6)
    assert_close(normed_TD, torch.full((3, 7), math.sqrt(0.5)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalised_rows_may_lie_apart_in_memory(dtype):
    x_TD, delta_TD, weight_D = make_norm(7, 133, dtype)
    wide_x, wide_delta = torch.full((2, 7, 150), math.nan, dtype=dtype).to(DEVICE_TYPE).unbind()
    wide_x[:, 3:136], wide_delta[:, 9:142] = on_device(x_TD), on_device(delta_TD)
    expected_TD, expected_sum_TD = normed(x_TD, delta_TD, weight_D)
    normed_TD = add_rms_norm_(wide_x[:, 3:136], wide_delta[:, 9:142], on_device(weight_D), EPS)
    assert torch.equal(normed_TD.cpu(), expected_TD)
    assert torch.equal(wide_x[:, 3:136].cpu(), expected_sum_TD)
    assert wide_x[:, :3].isnan().all()
    assert wide_x[:, 136:].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_leaves_the_other_norms_alone(value):
    x_TD, delta_TD, weight_D = make_norm(7, 133, torch.bfloat16)
    expected_TD, _ = normed(x_TD, delta_TD, weight_D)
    delta_TD[3, 100] = value
    normed_TD, _ = normed(x_TD, delta_TD, weight_D)
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(normed_TD[others], expected_TD[others])
    assert normed_TD[3, 100].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 300, 900])
def test_a_norm_depends_neither_on_its_batch_nor_on_the_run(dtype, size):
    x_TD, delta_TD, weight_D = make_norm(33, size, dtype)
    together_TD, _ = normed(x_TD, delta_TD, weight_D)
    assert torch.equal(normed(x_TD, delta_TD, weight_D)[0], together_TD)
    for row in (0, 8, 32):
        one = slice(row, row + 1)
        alone_TD, _ = normed(x_TD[one], delta_TD[one], weight_D)
        assert torch.equal(alone_TD, together_TD[one])


def test_few_kinds_of_programs_serve_every_width():
    parts = {size: part_of(size) for size in [*range(1, 3000), *range(3000, 70_000, 997)]}
    for size, part in parts.items():
        assert part.num_columns >= min(size, 4096)
        assert all(number & (number - 1) == 0 for number in part)
        assert part.num_rows * part.num_columns // part.num_warps <= 1024
    assert len(set(parts.values())) <= 16


@pytest.mark.parametrize(
    ("name", "make_wrong"),
    [
        ("x_TD", lambda: torch.zeros(7)),
        ("x_TD", lambda: torch.zeros(133, 7).T),
        ("delta_TD", lambda: torch.zeros(6, 133)),
        ("delta_TD", lambda: torch.zeros(7, 133, dtype=torch.bfloat16)),
        ("delta_TD", lambda: torch.zeros(133, 7).T),
        ("weight_D", lambda: torch.zeros(132)),
        ("weight_D", lambda: torch.zeros(133, dtype=torch.float64)),
        ("weight_D", lambda: torch.zeros(266)[::2]),
        ("rows_Z", lambda: torch.tensor([0], dtype=torch.int32)),
        ("rows_Z", lambda: torch.tensor([[0]])),
        ("rows_Z", lambda: torch.arange(6)[::2]),
        ("weight_D", lambda: torch.zeros(133, device="meta")),
        ("rows_Z", lambda: torch.zeros(3, dtype=torch.int64, device="meta")),
    ],
)
def test_wrong_arguments_of_a_norm_are_named_and_nothing_is_written(name, make_wrong):
    tensors = make_norm(7, 133, torch.float32)
    arguments = dict(zip(("x_TD", "delta_TD", "weight_D"), map(on_device, tensors), strict=True))
    with torch.device(DEVICE_TYPE):
        wrong = make_wrong()
    with pytest.raises(ValueError, match=name):
        add_rms_norm_(**arguments | {name: wrong}, eps=EPS)
    assert torch.equal(arguments["x_TD"].cpu(), tensors[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GATED_SHAPES)
def test_gated_product_equals_torch(dtype, shape):
    gate_up_TF2 = make_gate_up(*shape, dtype)
    gated_TF = gated(gate_up_TF2)
    assert gated_TF.shape == shape
    assert_bits_close(gated_TF, gated_by_torch(gate_up_TF2))


@pytest.mark.parametrize("dtype", HALVES)
def test_silu_of_every_16_bit_value_equals_torch(dtype):
    every_TF = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(64, 1024)
    gated_TF = gated(torch.cat([every_TF, torch.ones_like(every_TF)], dim=1))
    assert_bits_close(gated_TF, F.silu(every_TF))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_that_are_not_finite_behave_as_in_torch(dtype):
    gates = [math.inf, -math.inf, math.nan, -0.0, 0.0, -88.5, -89.0, -200.0, 3e4, -3e4, 1.0]
    ups = [1.0, -1.0, 0.0, math.inf, math.nan]
    pairs_T2 = torch.cartesian_prod(torch.tensor(gates), torch.tensor(ups)).to(dtype)
    gated_T1 = gated(pairs_T2)
    expected_T1 = gated_by_torch(pairs_T2)
    assert_bits_close(gated_T1, expected_T1)
    numbers = ~expected_T1.isnan()
    assert torch.equal(gated_T1[numbers].signbit(), expected_T1[numbers].signbit())


def test_silu_is_rounded_before_the_product():
    gate_up_TF2 = make_gate_up(33, 64, torch.bfloat16)
    rounded_once = gated_by_torch(gate_up_TF2.float()).bfloat16()
    assert (gated(gate_up_TF2) != rounded_once).float().mean() > 0.1


def test_gated_rows_may_lie_apart_in_memory():
    gate_up_TF2 = make_gate_up(7, 133, torch.bfloat16)
    wide = torch.full((7, 300), math.nan, dtype=torch.bfloat16, device=DEVICE_TYPE)
    wide[:, 5:271] = on_device(gate_up_TF2)
    assert torch.equal(silu_multiply(wide[:, 5:271]).cpu(), gated(gate_up_TF2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_row_depends_neither_on_its_batch_nor_on_the_run(dtype):
    gate_up_TF2 = make_gate_up(33, 300, dtype)
    together_TF = gated(gate_up_TF2)
    assert torch.equal(gated(gate_up_TF2), together_TF)
    for row in (0, 7, 32):
        assert torch.equal(gated(gate_up_TF2[row : row + 1])[0], together_TF[row])


def test_batches_without_tokens_have_no_rows():
    assert gated(torch.zeros(0, 266)).shape == (0, 133)
    assert normed(torch.zeros(0, 7), None, None)[0].shape == (0, 7)
    assert [len(result) for result in best(torch.zeros(0, 7))] == [0, 0]


@pytest.mark.parametrize("gate_up", [torch.zeros(4), torch.zeros(3, 7), torch.zeros(4, 3).T])
def test_wrong_shapes_of_gates_are_named(gate_up):
    with pytest.raises(ValueError, match="gate_up_TF2"):
        silu_multiply(gate_up.to(DEVICE_TYPE))


def test_types_and_devices_that_kernels_do_not_know_are_named():
    doubles = torch.zeros(1, 4, dtype=torch.float64, device=DEVICE_TYPE)
    with pytest.raises(ValueError, match=r"x_TD is torch\.float64"):
        add_rms_norm_(doubles, None, None, EPS)
    with pytest.raises(ValueError, match=r"gate_up_TF2 is torch\.float64"):
        silu_multiply(doubles)
    for call in (lambda x: add_rms_norm_(x, None, None, EPS), silu_multiply, best_tokens):
        with pytest.raises(ValueError, match="meta"):
            call(torch.zeros(1, 4, device="meta"))


@pytest.mark.parametrize("num_rows", [1, 3, 33])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_best_tokens_are_those_of_the_sampler(num_rows, vocab_size):
    rows_ZV = make_logits(num_rows, vocab_size)
    best_Z, token_Z = best(rows_ZV)
    expected_best_Z, expected_token_Z = row_blocks.best_tokens(rows_ZV)
    assert best_Z.dtype == torch.float32
    assert token_Z.dtype == torch.int64
    assert torch.equal(best_Z, expected_best_Z)
    assert torch.equal(token_Z, expected_token_Z)


@pytest.mark.parametrize("vocab_size", [133, 9001])
@pytest.mark.parametrize("value", [0.0, -0.5, math.inf, -math.inf, math.nan])
def test_of_equally_good_tokens_the_first_is_best(vocab_size, value):
    """Wherever they are, and if there are no others."""
    rows_ZV = torch.full((4, vocab_size), value)
    rows_ZV[0], rows_ZV[1, : vocab_size - 2], rows_ZV[2, 1 : vocab_size - 1] = 3 * (-math.inf,)
    rows_ZV[0, [70, 131, vocab_size - 1]] = value
    expected_Z = [70, vocab_size - 2, 0, 0]
    if value == -math.inf:
        expected_Z = 4 * [0]
    best_Z, token_Z = best(rows_ZV)
    assert token_Z.tolist() == expected_Z
    torch.testing.assert_close(best_Z, torch.full((4,), value), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", [0, 127, BLOCK_TOKENS - 1, BLOCK_TOKENS, 5999])
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7F800001, -1])
def test_nan_is_better_than_any_number(place, bits):
    rows_ZV = torch.zeros(3, 6000)
    rows_ZV[1, 5] = math.inf
    rows_ZV.view(torch.int32)[1, place] = bits
    assert rows_ZV[1, place].isnan()
    best_Z, token_Z = best(rows_ZV)
    assert best_Z.isnan().tolist() == [False, True, False]
    assert token_Z.tolist() == [0, place, 0]


def test_the_two_zeros_are_equally_good():
    rows_ZV = torch.full((2, 133), -1.0)
    rows_ZV[0, 7], rows_ZV[0, 8] = -0.0, 0.0
    rows_ZV[1, 7], rows_ZV[1, 8] = 0.0, -0.0
    best_Z, token_Z = best(rows_ZV)
    assert token_Z.tolist() == [7, 7]
    assert best_Z.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("numbers", [[-1e-45, 1e-45], [-3e38, 3e38], [-2.0, -1.0], [1.0, 2.0]])
def test_numbers_of_either_sign_and_any_size_are_ordered(numbers):
    rows_ZV = torch.tensor([numbers, numbers[::-1]])
    best_Z, token_Z = best(rows_ZV)
    assert token_Z.tolist() == [1, 0]
    assert torch.equal(best_Z, rows_ZV.amax(dim=-1))


def test_only_the_tokens_of_the_rows_are_looked_at():
    rows_ZV = make_logits(7, 133)
    wide = torch.full((7, 5000), math.nan, device=DEVICE_TYPE)
    wide[:, 3:136] = on_device(rows_ZV)
    best_Z, token_Z = best_tokens(wide[:, 3:136])
    assert torch.equal(best_Z.cpu(), rows_ZV.amax(dim=-1))
    assert torch.equal(token_Z.cpu(), row_blocks.best_tokens(rows_ZV)[1])


@pytest.mark.parametrize(
    "rows_ZV",
    [torch.zeros(3), torch.zeros(3, 0), torch.zeros(4, 3).T, torch.zeros(3, 4).bfloat16()],
)
def test_wrong_rows_of_logits_are_named(rows_ZV):
    with pytest.raises(ValueError, match="rows_ZV"):
        best_tokens(rows_ZV.to(DEVICE_TYPE))
