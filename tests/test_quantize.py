"""Matrices of integers: what is multiplied by is what `rows` says, however many rows there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loraswarm.config import EngineConfig
from loraswarm.errors import ConfigError
from loraswarm.models.quantized import crossover
from loraswarm.models.quantized.crossover import MIN_KERNEL_ROWS, NO_LIMIT, Crossover
from loraswarm.models.quantized.int4 import Int4Matrix, kernel_reads_our_order, quantize_int4
from loraswarm.models.quantized.int8 import Int8Matrix, quantize_int8
from loraswarm.models.quantized.loading import quantized_matrix
from loraswarm.models.quantized.weight import IntegerMatrix, QuantizedWeight
from tolerance import assert_close

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {
    "int8": [(133, 96), (1, 16), (64, 128), (7, 7), (33, 133)],
    "int4": [(133, 96), (1, 32), (64, 128), (200, 160), (3, 384)],
}
CASES = [(method, size) for method in SIZES for size in SIZES[method]]
UNLIMITED = 1000


def random_rows(size: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * size[1] ** -0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 7, 133])
@pytest.mark.parametrize(("method", "size"), CASES)
def test_products_are_those_of_the_rows_by_either_way(
    method: str, size: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> None:
    matrix = quantized_matrix("w", random_rows(size), method)
    generator = torch.Generator().manual_seed(num_rows)
    x_TI = torch.randn(num_rows, size[1], generator=generator).to(dtype)
    bias_O = torch.randn(size[0], generator=generator).to(dtype)
    for limit in (0, UNLIMITED):
        weight = QuantizedWeight(matrix, dtype, limit)
        expected_TO = x_TI.float() @ weight.rows.float().T
        y_TO = weight.multiply(x_TI)
        assert y_TO.dtype == dtype
        assert y_TO.is_contiguous()
        assert_close(y_TO, expected_TO, dtype)
        assert_close(weight.multiply(x_TI, bias_O), expected_TO + bias_O.float(), dtype)


@pytest.mark.parametrize("method", SIZES)
def test_no_rows_make_no_products(method: str) -> None:
    weight = QuantizedWeight(
        quantized_matrix("w", random_rows((64, 32)), method), torch.bfloat16, UNLIMITED
    )
    assert weight.multiply(torch.empty(0, 32, dtype=torch.bfloat16)).shape == (0, 64)


def test_the_order_of_columns_is_undone_in_rows_and_done_in_products() -> None:
    rows_OI = random_rows((40, 64))
    order_I = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    plain = QuantizedWeight(quantize_int8(rows_OI), torch.float32)
    ordered = QuantizedWeight(quantize_int8(rows_OI[:, order_I]), torch.float32, order_I=order_I)
    assert not torch.equal(order_I, torch.arange(64))
    assert torch.equal(plain.rows, ordered.rows)
    x_TI = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert_close(ordered.multiply(x_TI), plain.multiply(x_TI), torch.float32)


@pytest.mark.parametrize(("method", "share"), [("int8", 1 / 254), ("int4", 1 / 15)])
def test_values_move_by_about_half_a_step_at_most(method: str, share: float) -> None:
    rows_OI = random_rows((133, 96))
    found_OI = QuantizedWeight(quantized_matrix("w", rows_OI, method), torch.float32).rows
    largest_O1 = rows_OI.abs().amax(1, keepdim=True)
    assert not torch.equal(found_OI, rows_OI)
    # A step is 1/127 of the largest or 2/15; its size and place are rounded to bfloat16.
    assert bool(((found_OI - rows_OI).abs() <= share * largest_O1 * 1.15).all())


@pytest.mark.parametrize("method", SIZES)
def test_parts_are_quantized_as_the_fused_matrix_is(method: str) -> None:
    rows_OI = random_rows((200, 96))
    whole = QuantizedWeight(quantized_matrix("w", rows_OI, method), torch.bfloat16).rows
    parts = [
        QuantizedWeight(quantized_matrix("w", part, method), torch.bfloat16).rows
        for part in rows_OI.split([133, 7, 60])
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_rows_and_groups_of_one_value_stay_finite(
    quantize: Callable[[Tensor], IntegerMatrix],
) -> None:
    rows_OI = torch.zeros(3, 64)
    rows_OI[1] = 0.5
    found_OI = QuantizedWeight(quantize(rows_OI), torch.float32).rows
    assert torch.equal(found_OI[0], rows_OI[0])
    assert_close(found_OI[1], rows_OI[1], torch.bfloat16)


def test_widths_that_the_8_bit_kernel_reads_past_do_without_it() -> None:
    assert quantize_int8(random_rows((16, 48))).has_kernel(torch.bfloat16)
    assert not quantize_int8(random_rows((16, 40))).has_kernel(torch.bfloat16)
    assert not quantize_int8(random_rows((16, 48))).has_kernel(torch.float32)


def test_a_scale_that_bfloat16_cannot_hold_is_not_rounded() -> None:
    ints_OI = torch.arange(64, dtype=torch.int8).view(2, 32)
    scale_O1 = torch.tensor([[0.5], [1 / 3]])
    matrix = Int8Matrix(ints_OI, scale_O1)
    assert not matrix.has_kernel(torch.bfloat16)
    assert torch.equal(QuantizedWeight(matrix, torch.float32).rows, ints_OI * scale_O1)
    four = Int4Matrix((ints_OI % 16).to(torch.uint8), scale_O1.T, -scale_O1.T)
    expected_OI = (ints_OI % 16 - 8) * scale_O1 - scale_O1
    assert_close(QuantizedWeight(four, torch.float32).rows, expected_OI, torch.float32)
    assert four.kind == "int4 of 3 terms"


def test_matrices_take_the_bytes_of_their_integers() -> None:
    rows_OI = random_rows((512, 1024))
    assert quantize_int8(rows_OI).nbytes < 1.01 * rows_OI.numel()
    assert quantize_int4(rows_OI).nbytes < 1.07 * rows_OI.numel() / 2


def test_what_cannot_be_quantized_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.x has 48 inputs; --quantize int4 needs"):
        quantized_matrix("model.x", random_rows((64, 48)), "int4")
    for method in SIZES:
        for value in (float("nan"), float("inf")):
            rows_OI = random_rows((64, 64))
            rows_OI[3, 5] = value
            with pytest.raises(ConfigError, match=r"model\.x has values that are not finite"):
                quantized_matrix("model.x", rows_OI, method)


def test_options_other_than_int8_and_int4_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantize is 'int3'; it must be one of int8, int4"):
        EngineConfig(model="m", quantize="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel_s_per_row", "floats_s", "floats_s_per_row", "expected"),
    [
        (1.0, 20.0, 0.0, 20),
        (1.0, 20.0, 0.5, 40),
        (1.0, 0.5, 0.0, MIN_KERNEL_ROWS),
        (1.0, 20.0, 1.0, NO_LIMIT),
        (1.0, 20.0, 2.0, NO_LIMIT),
    ],
)
def test_the_crossover_is_where_the_kernel_stops_being_faster(
    kernel_s_per_row: float,
    floats_s: float,
    floats_s_per_row: float,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def time_s(weight: QuantizedWeight, x_TI: Tensor) -> float:
        if weight.max_kernel_rows:
            return kernel_s_per_row * len(x_TI)
        return floats_s + floats_s_per_row * len(x_TI)

    monkeypatch.setattr(crossover, "_time_s", time_s)
    limits = Crossover(torch.bfloat16)
    assert limits.max_rows(quantize_int8(random_rows((16, 32)))) == expected
    assert limits.limits == {"int8": expected}
    assert Crossover(torch.float32).max_rows(quantize_int8(random_rows((16, 32)))) == 0


@pytest.mark.skipif(not kernel_reads_our_order(), reason="torch packs otherwise on this CPU")
def test_the_4_bit_kernel_is_used_for_few_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = QuantizedWeight(quantize_int4(random_rows((64, 64))), torch.bfloat16, 4)
    calls = []
    multiply = Int4Matrix.multiply

    def counted(self: Int4Matrix, x_TI: Tensor) -> Tensor:
        calls.append(len(x_TI))
        return multiply(self, x_TI)

    monkeypatch.setattr(Int4Matrix, "multiply", counted)
    for num_rows in (1, 4, 5, 133):
        weight.multiply(torch.ones(num_rows, 64, dtype=torch.bfloat16))
    assert calls == [1, 4]
