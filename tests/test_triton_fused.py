"""The product with the base's weight that adds the low-rank updates itself equals the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_cases import FIRST_SITE, LoraCase, make_general_case, make_lora_case, segments_of
from loraswarm.kernels import reference
from loraswarm.kernels.triton.fused_linear import BLOCK_TOKENS, Updates, fused_linear
from loraswarm.kernels.triton.launch import DEVICE_TYPE
from loraswarm.kernels.triton.linear import RowWeight
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DTYPES = [torch.bfloat16, torch.float16]
MIXED = [("adapter0", 70), (None, 9), ("adapter2", 1), ("adapter3", 80), ("adapter4", 2)]
GENERAL = [("adapter0", 40), (None, 100), ("adapter4", 9, "adapter2"), ("adapter6", 3)]


def weight_of(case: LoraCase) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    in_features = case.x_TI.shape[1]
    weight_OI = torch.randn(case.y_TO.shape[1], in_features, generator=generator)
    return (weight_OI * in_features**-0.5).to(case.x_TI.dtype)


def fused(case: LoraCase, weight_OI: Tensor, h_QTR: Tensor) -> Tensor:
    moved = [tensor.to(DEVICE_TYPE) for tensor in (h_QTR, case.pool)]
    updates = Updates(*moved, case.tiles, FIRST_SITE, case.out_bounds)
    weight = RowWeight(weight_OI.to(DEVICE_TYPE))
    return fused_linear(case.x_TI.to(DEVICE_TYPE), weight, updates).cpu()


def expected(case: LoraCase, weight_OI: Tensor, h_QTR: Tensor) -> Tensor:
    """By the reference, rounded nowhere; the case has no vectors, which would lie elsewhere."""
    assert (case.tiles.u_offset < 0).all()
    assert (case.tiles.v_offset < 0).all()
    y_TO = reference.linear(case.x_TI.float(), weight_OI.float(), None)
    others = case.tiles, FIRST_SITE, case.out_bounds
    reference.lora_expand_(y_TO, h_QTR, case.pool.float(), *others)
    return y_TO


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(37, (48, 13, 101)), (64, (128, 144)), (133, (5,))])
def test_it_equals_the_product_and_then_the_updates(sizes, dtype):
    case = make_lora_case(dtype, MIXED, *sizes)
    weight_OI, h_QTR = weight_of(case), case.shrink(reference)
    result = fused(case, weight_OI, h_QTR)
    assert_close(result, expected(case, weight_OI, h_QTR), dtype)
    base_TO = reference.linear(case.x_TI, weight_OI, None)
    assert_close(result[70:79], base_TO[70:79], dtype)
    assert not torch.allclose(result[:70].float(), base_TO[:70].float(), atol=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_and_gains_equal_the_reference(dtype):
    case = make_general_case(dtype, GENERAL, 70, (150, 7))
    weight_OI, h_QTR = weight_of(case), case.shrink(reference)
    y_TO = reference.linear(case.x_TI, weight_OI, None)
    reference.lora_expand_(y_TO, h_QTR, case.pool, case.tiles, FIRST_SITE, case.out_bounds)
    assert case.tiles.has_gains[FIRST_SITE]
    assert_close(fused(case, weight_OI, h_QTR), y_TO, dtype)


@pytest.mark.parametrize("pattern", ["distinct", "identical"])
def test_any_popularity_equals_the_reference(pattern):
    case = make_lora_case(torch.bfloat16, segments_of(pattern, 133), 40, (33,))
    weight_OI, h_QTR = weight_of(case), case.shrink(reference)
    assert_close(fused(case, weight_OI, h_QTR), expected(case, weight_OI, h_QTR), torch.bfloat16)


def test_weights_that_are_not_numbers_stay_with_their_adapter():
    clean = make_lora_case(torch.bfloat16, MIXED)
    spoiled = make_lora_case(torch.bfloat16, MIXED, poisoned="adapter3")
    weight_OI = weight_of(clean)
    results = [fused(case, weight_OI, case.shrink(reference)) for case in (clean, spoiled)]
    others = [*range(80), 160, 161]
    assert torch.equal(results[0][others], results[1][others])
    assert results[1][80:160].isnan().any(dim=1).all()


def test_rows_beyond_the_last_segment_are_products_alone():
    case = make_lora_case(torch.bfloat16, [("adapter3", BLOCK_TOKENS - 5)], 40, (33,))
    more = torch.randn(9, 40, generator=torch.Generator().manual_seed(7)).bfloat16()
    longer = replace(
        case, x_TI=torch.cat([case.x_TI, more]), y_TO=torch.cat([case.y_TO, case.y_TO[:9]])
    )
    weight_OI, h_QTR = weight_of(case), longer.shrink(reference)
    h_QTR[:, -9:] = float("nan")
    result = fused(longer, weight_OI, h_QTR)
    assert_close(result[-9:], reference.linear(more, weight_OI, None), torch.bfloat16)


def test_wrong_arguments_are_named():
    case = make_lora_case(torch.bfloat16, MIXED)
    weight_OI, h_QTR = weight_of(case), case.shrink(reference)
    for changed, message in (
        (replace(case, x_TI=case.x_TI[:, :-1]), "x_TI is"),
        (replace(case, x_TI=case.x_TI.float()), r"x_TI is torch\.float32"),
        (replace(case, x_TI=case.x_TI[:9]), "h_QTR and y_TO have different numbers of tokens"),
        (replace(case, pool=case.pool[:500]), "a tile lies outside"),
    ):
        with pytest.raises(ValueError, match=message):
            fused(changed, weight_OI, h_QTR)
