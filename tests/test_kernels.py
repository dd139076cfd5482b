"""The LoRA kernels equal the reference on awkward batches, and the reference its formula."""

from __future__ import annotations

import sys

import pytest
import torch

from kernel_cases import (
    BACKENDS,
    BATCH_SIZES,
    FIRST_SITE,
    PATTERNS,
    THREAD_COUNTS,
    make_lora_case,
    segments_of,
    use_all_threads,
)
from loraswarm.kernels import cpu, reference
from loraswarm.kernels.cpu import program
from loraswarm.kernels.cpu.linear import pack_linear
from loraswarm.kernels.cpu.lora import linear_shrink
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
MIXED = [("adapter0", 9), (None, 4), ("adapter2", 1), ("adapter3", 40), ("adapter4", 2)]


@pytest.fixture(autouse=True)
def all_threads(monkeypatch):
    use_all_threads(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", BATCH_SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lora_equals_reference_for_every_popularity(pattern, num_tokens, dtype):
    case = make_lora_case(dtype, segments_of(pattern, num_tokens))
    expected_h = case.shrink(reference)
    h_QTR = case.shrink(cpu)
    assert_close(case.defined(h_QTR), case.defined(expected_h), torch.float32)
    expected = case.expanded(reference, expected_h)
    if any(name is not None for name, count in case.segments if count):
        assert not torch.equal(expected, case.y_TO)
    assert_close(case.expanded(cpu, h_QTR), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, (1,)), (16, (256, 64)), (300, (515, 7)), (999, (16, 1290))])
def test_lora_equals_reference_for_every_width(sizes, dtype):
    in_features, out_sizes = sizes
    case = make_lora_case(dtype, MIXED, in_features, out_sizes)
    h_QTR = case.shrink(reference)
    assert_close(case.defined(case.shrink(cpu)), case.defined(h_QTR), torch.float32)
    assert_close(case.expanded(cpu, h_QTR), case.expanded(reference, h_QTR), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_update_equals_the_formula_for_one_adapter(backend, dtype):
    case = make_lora_case(dtype, [("adapter3", 7)], out_sizes=(48,))
    first, last = case.tiles.ranges[FIRST_SITE, 0].tolist()
    expected = case.y_TO.clone().float()
    for tile in range(first, last):
        ranks = int(case.tiles.ranks[tile])
        a_at, bt_at = int(case.tiles.a_offset[tile]), int(case.tiles.bt_offset[tile])
        a_RI = case.pool[a_at : a_at + ranks * 37].view(ranks, 37).float()
        bt_RO = case.pool[bt_at : bt_at + ranks * 48].view(ranks, 48).float()
        expected += float(case.tiles.scale[tile]) * (case.x_TI.float() @ a_RI.T @ bt_RO)
    assert last - first > 1
    assert_close(case.expanded(backend, case.shrink(backend)), expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_tiles_keep_their_bits(backend, dtype):
    case = make_lora_case(dtype, MIXED)
    case.y_TO[9:13] = float("nan")
    bits = case.y_TO.view(torch.uint8)
    result = case.expanded(backend, case.shrink(backend)).view(torch.uint8)
    assert torch.equal(result[9:13], bits[9:13])
    assert not torch.equal(result[:9], bits[:9])


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_an_adapter_does_not_have_keep_their_bits(backend):
    case = make_lora_case(torch.bfloat16, MIXED)
    result = case.expanded(backend, case.shrink(backend))
    low = case.out_bounds[2]
    assert torch.equal(result[13, low:], case.y_TO[13, low:])
    assert not torch.equal(result[13, :low], case.y_TO[13, :low])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_numbers_stay_with_their_adapter(backend, dtype):
    clean = make_lora_case(dtype, MIXED)
    poisoned = make_lora_case(dtype, MIXED, poisoned="adapter3")
    expected = clean.expanded(backend, clean.shrink(backend))
    result = poisoned.expanded(backend, poisoned.shrink(backend))
    others = [*range(14), 54, 55]
    assert torch.equal(result[others], expected[others])
    assert result[14:54].isnan().any(dim=1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_a_number_stays_alone(backend, dtype):
    case = make_lora_case(dtype, MIXED)
    expected = case.expanded(backend, case.shrink(backend))
    case.x_TI[3] = float("nan")
    result = case.expanded(backend, case.shrink(backend))
    others = [*range(3), *range(4, 56)]
    assert torch.equal(result[others], expected[others])
    assert result[3, :61].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch(dtype):
    case = make_lora_case(dtype, MIXED)
    together = case.expanded(cpu, case.shrink(cpu))
    for token in (0, 8, 14, 53):
        alone = case.alone(token)
        assert torch.equal(alone.expanded(cpu, alone.shrink(cpu))[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_equal_bit_for_bit_for_any_number_of_threads(dtype):
    case = make_lora_case(dtype, MIXED, 300, (515, 7, 64))
    results = []
    for count in [*THREAD_COUNTS, *THREAD_COUNTS]:
        cpu.set_num_threads(count)
        h_QTR = case.shrink(cpu)
        results.append((case.defined(h_QTR), case.expanded(cpu, h_QTR)))
    for h_QTR, y_TO in results[1:]:
        assert torch.equal(h_QTR, results[0][0])
        assert torch.equal(y_TO, results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_writes_only_its_columns_of_a_wider_tensor(backend, dtype):
    case = make_lora_case(dtype, MIXED)
    h_QTR = case.shrink(backend)
    wider = torch.full((56, case.y_TO.shape[1] + 20), 7.0, dtype=dtype)
    part = wider[:, 9 : 9 + case.y_TO.shape[1]]
    part.copy_(case.y_TO)
    backend.lora_expand_(part, h_QTR, case.pool, case.tiles, FIRST_SITE, case.out_bounds)
    assert torch.equal(part, case.expanded(backend, h_QTR))
    assert (wider[:, :9] == 7).all()
    assert (wider[:, -11:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_rounded_to_nearest_even(backend, dtype):
    case = make_lora_case(dtype, [("adapter4", 515)], out_sizes=(1,))
    tile = int(case.tiles.ranges[FIRST_SITE, 0, 0])
    case.tiles.scale[:] = 1.0
    assert int(case.tiles.ranks[tile]) == 1
    case.pool[int(case.tiles.bt_offset[tile])] = 1.0
    exact = torch.randn(515, generator=torch.Generator().manual_seed(1)) * 100
    ties = torch.tensor([1.00390625, 1.01171875, 1.00048828125, 1.00146484375, -1.00390625])
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, 65520.0, 1e-40])
    exact[:5], exact[5:11] = ties, special
    y_TO = torch.zeros(515, 1, dtype=dtype)
    h_QTR = torch.zeros(1, 515, 16)
    h_QTR[0, :, 0] = exact
    backend.lora_expand_(y_TO, h_QTR, case.pool, case.tiles, FIRST_SITE, (0, 1))
    torch.testing.assert_close(y_TO[:, 0], exact.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 133])
def test_lora_equals_reference_for_rows_longer_than_what_is_summed_at_once(num_tokens, dtype):
    case = make_lora_case(dtype, [("adapter3", num_tokens)], 4131, (2500,))
    h_QTR = case.shrink(reference)
    assert_close(case.defined(case.shrink(cpu)), case.defined(h_QTR), torch.float32)
    assert_close(case.expanded(cpu, h_QTR), case.expanded(reference, h_QTR), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize(
    "names", [("adapter5", "adapter3", "adapter12"), [f"adapter{4 + 7 * i}" for i in range(6)]]
)
def test_sums_of_many_tiles_equal_reference(names, num_tokens, dtype):
    first, *others = names
    case = make_lora_case(dtype, [(first, num_tokens, *others), (None, 2)], 70, (4200,))
    assert int(case.tiles.max_tiles[FIRST_SITE]) > 4
    h_QTR = case.shrink(reference)
    assert_close(case.defined(case.shrink(cpu)), case.defined(h_QTR), torch.float32)
    assert_close(case.expanded(cpu, h_QTR), case.expanded(reference, h_QTR), dtype)


def test_a_long_segment_gives_each_token_what_it_gets_alone():
    case = make_lora_case(torch.bfloat16, [("adapter5", 70, "adapter3")], 4131, (300,))
    together_h = case.shrink(cpu)
    together = case.expanded(cpu, together_h)
    for token in (0, 33, 69):
        alone = case.alone(token)
        h_QTR = alone.shrink(cpu)
        assert torch.equal(alone.defined(h_QTR)[:, 0], case.defined(together_h)[:, token])
        assert torch.equal(alone.expanded(cpu, h_QTR)[0], together[token])


@pytest.mark.parametrize("num_tokens", [1, 33])
def test_a_product_and_a_shrink_together_equal_both_apart(num_tokens):
    case = make_lora_case(torch.bfloat16, segments_of("zipf", num_tokens), 64, (96, 33))
    weight_OI = torch.randn(129, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = pack_linear(weight_OI)
    if weight is None:
        pytest.skip("this CPU multiplies from no panels")
    y_TO, h_QTR = linear_shrink(case.x_TI, weight, None, case.pool, case.tiles, FIRST_SITE, 2)
    assert torch.equal(case.defined(h_QTR), case.defined(case.shrink(cpu)))
    assert_close(y_TO, case.x_TI.float() @ weight_OI.float().T, torch.bfloat16)


def test_recorded_updates_of_several_tables_equal_those_run_at_once(monkeypatch):
    monkeypatch.setattr(program, "RECORDED_PRODUCTS", sys.maxsize)  # nothing begins early
    cases = [
        make_lora_case(torch.bfloat16, segments_of("zipf", num_tokens), 64, (96, 33))
        for num_tokens in (7, 3)
    ]
    expected = [case.expanded(cpu, case.shrink(cpu)) for case in cases]
    results = [case.y_TO.clone() for case in cases]
    with cpu.recording():
        for case, y_TO in zip(cases, results, strict=True):
            h_QTR = case.shrink(cpu)
            cpu.lora_expand_(y_TO, h_QTR, case.pool, case.tiles, FIRST_SITE, case.out_bounds)
            assert torch.equal(y_TO, case.y_TO)
    for result, wanted, case in zip(results, expected, cases, strict=True):
        assert torch.equal(result, wanted)
        assert not torch.equal(result, case.y_TO)


def test_a_table_serves_modules_of_several_widths():
    case = make_lora_case(torch.bfloat16, MIXED, 64, (96, 96))
    narrow = case.x_TI[:, :33].contiguous()
    for x_TI in (case.x_TI, narrow, case.x_TI):
        arguments = x_TI, case.pool, case.tiles, FIRST_SITE, 2
        result, expected = cpu.lora_shrink(*arguments), reference.lora_shrink(*arguments)
        assert_close(case.defined(result), case.defined(expected), torch.float32)
    h_QTR = case.shrink(reference)
    for width in (192, 150):
        y_TO, expected = case.y_TO[:, :width].clone(), case.y_TO[:, :width].clone()
        for backend, rows in ((cpu, y_TO), (reference, expected)):
            bounds = (0, 96, width)
            backend.lora_expand_(rows, h_QTR, case.pool, case.tiles, FIRST_SITE, bounds)
        assert_close(y_TO, expected, torch.bfloat16)
