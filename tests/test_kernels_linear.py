"""Products with a packed bfloat16 weight against torch, at awkward sizes."""

import pytest
import torch

from kernel_cases import use_all_threads
from loraswarm.kernels.cpu import linear, pack_linear
from loraswarm.kernels.cpu.dot import HAS_DOT
from tolerance import assert_close

ROWS = (1, 2, 3, 7, 11, 12, 13, 25, 133, 193, 400)
SIZES = ((2, 1), (34, 7), (64, 32), (100, 33), (896, 133), (130, 97))  # (in, out)

pytestmark = pytest.mark.skipif(not HAS_DOT, reason="this CPU does not multiply bfloat16 pairs")


@pytest.fixture(autouse=True)
def many_threads(monkeypatch):
    use_all_threads(monkeypatch)


def case(num_rows, in_features, out_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, in_features, generator=generator).bfloat16()
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    bias = torch.randn(out_features, generator=generator).bfloat16()
    return x, weight.bfloat16(), bias


@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
def test_packing_keeps_every_bit(in_features, out_features):
    _, weight, _ = case(1, in_features, out_features)
    assert torch.equal(pack_linear(weight).unpack(), weight)


@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
def test_rows_are_looked_up_in_a_packed_weight(in_features, out_features):
    _, weight, _ = case(1, in_features, out_features)
    ids = torch.tensor([out_features - 1, 0, out_features // 2, 0])
    assert torch.equal(pack_linear(weight).look_up(ids), weight[ids])
    assert pack_linear(weight).look_up(ids[:0]).shape == (0, in_features)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
def test_product_equals_torch_rounded_once(num_rows, in_features, out_features):
    x, weight, bias = case(num_rows, in_features, out_features)
    expected = (x.double() @ weight.double().T + bias.double()).bfloat16()
    y = linear(x, pack_linear(weight), bias)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, torch.bfloat16)
    num_different = int((y != expected).sum())
    assert num_different <= max(1, y.numel() // 50)  # only where the exact sum is near a tie


@pytest.mark.parametrize("num_rows", ROWS)
def test_float32_output_holds_the_rounded_values(num_rows):
    x, weight, _ = case(num_rows, 100, 33)
    packed = pack_linear(weight)
    y = linear(x, packed, None, True)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(x, packed, None).float())


def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, bias = case(133, 130, 97)
    packed = pack_linear(weight)
    together = linear(x, packed, bias)
    for row in range(0, 133, 17):
        assert torch.equal(linear(x[row : row + 1], packed, bias), together[row : row + 1])


def test_rows_may_be_part_of_wider_ones():
    x, weight, bias = case(9, 130, 97)
    wide = torch.full((9, 300), float("nan")).bfloat16()
    wide[:, 40:170] = x
    packed = pack_linear(weight)
    assert torch.equal(linear(wide[:, 40:170], packed, bias), linear(x, packed, bias))


def test_not_a_number_stays_in_its_row():
    x, weight, bias = case(14, 130, 97)
    packed = pack_linear(weight)
    clean = linear(x, packed, bias)
    x[3, 5] = float("nan")
    y = linear(x, packed, bias)
    assert y[3].isnan().all()
    others = [row for row in range(14) if row != 3]
    assert torch.equal(y[others], clean[others])


def test_no_rows_give_no_rows():
    _, weight, bias = case(1, 130, 97)
    assert linear(torch.empty(0, 130).bfloat16(), pack_linear(weight), bias).shape == (0, 97)


@pytest.mark.parametrize(
    "dtype_and_width", [(torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 33)]
)
def test_what_cannot_be_packed_is_left_to_torch(dtype_and_width):
    dtype, width = dtype_and_width
    assert pack_linear(torch.zeros(8, width, dtype=dtype)) is None


def test_wrong_arguments_are_named():
    x, weight, bias = case(3, 64, 32)
    packed = pack_linear(weight)
    with pytest.raises(ValueError, match="x_TI is"):
        linear(x[:, :62], packed, bias)
    with pytest.raises(ValueError, match=r"x_TI is torch\.float32"):
        linear(x.float(), packed, bias)
    with pytest.raises(ValueError, match="bias_O"):
        linear(x, packed, bias[:31])
