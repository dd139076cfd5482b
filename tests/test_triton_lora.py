"""Triton's LoRA kernels equal the reference: by decode and by prefill, in one split and in many.

On the CPU they are interpreted, so sizes are small. Tensors of the cases are moved to the device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_cases import (
    FIRST_SITE,
    KINDS,
    PATTERNS,
    LoraCase,
    make_general_case,
    make_lora_case,
    segments_of,
)
from loraswarm.kernels import TileTable, reference
from loraswarm.kernels.triton import items, lora
from loraswarm.kernels.triton.launch import DEVICE_TYPE, IS_INTERPRETED
from loraswarm.kernels.triton.plan import PlanArena, plans
from loraswarm.kernels.triton.shrink import shrink_blocks
from tolerance import TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DEVICE = torch.empty(0, device=DEVICE_TYPE).device
DTYPES = list(TOLERANCE)
SOME_DTYPES = [torch.float32, torch.bfloat16]
MIXED = [("adapter0", 9), (None, 4), ("adapter2", 1), ("adapter3", 18), ("adapter4", 2)]
GENERAL = [
    ("adapter0", 9),
    (None, 4),
    ("adapter2", 1),
    ("adapter3", 17),
    ("adapter4", 2, "adapter2"),
    ("adapter5", 1, "adapter4", "adapter9"),
    ("adapter6", 3),
    ("adapter7", 1),
]
FEW = [("adapter0", 9), (None, 2), ("adapter2", 17), ("adapter6", 2), ("adapter1", 1)]
"""Of the first tokens of segments the interpreter's products, too, are the same bits alone."""


class OnDevice:
    """The kernels for tensors of the CPU: moved to the device, and what is written back again."""

    def lora_shrink(
        self, x_TI: Tensor, pool: Tensor, tiles: TileTable, first_site: int, num_parts: int
    ) -> Tensor:
        x_TI, pool = x_TI.to(DEVICE), pool.to(DEVICE)
        return lora.lora_shrink(x_TI, pool, tiles, first_site, num_parts).cpu()

    def lora_expand_(self, y_TO: Tensor, h_QTR: Tensor, pool: Tensor, *others) -> None:
        moved_TO = y_TO if y_TO.device == DEVICE else y_TO.to(DEVICE)
        lora.lora_expand_(moved_TO, h_QTR.to(DEVICE), pool.to(DEVICE), *others)
        y_TO.copy_(moved_TO)


KERNELS = OnDevice()


@pytest.fixture(params=["decode", "prefill"])
def path(request, monkeypatch) -> str:
    """Cut every new table for one of them, whatever its segments."""
    monkeypatch.setattr(items, "DECODE_TOKENS", {"decode": 1 << 30, "prefill": 0}[request.param])
    return request.param


def assert_equals_reference(case: LoraCase, dtype: torch.dtype) -> None:
    h_QTR = case.shrink(reference)
    assert_close(case.defined(case.shrink(KERNELS)), case.defined(h_QTR), torch.float32)
    assert_close(case.expanded(KERNELS, h_QTR), case.expanded(reference, h_QTR), dtype)


@pytest.mark.parametrize(
    ("num_tokens", "dtype"), [(1, torch.float32), (3, torch.float16), (7, torch.bfloat16)]
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lora_equals_reference_for_every_popularity(pattern, num_tokens, dtype):
    case = make_lora_case(dtype, segments_of(pattern, num_tokens))
    assert_equals_reference(case, dtype)
    if any(name is not None for name, count in case.segments if count):
        assert not torch.equal(case.expanded(KERNELS, case.shrink(KERNELS)), case.y_TO)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lora_equals_reference_for_33_tokens_of_every_popularity(pattern, path):
    case = make_lora_case(torch.bfloat16, segments_of(pattern, 33), out_sizes=(101,))
    assert_equals_reference(case, torch.bfloat16)


@pytest.mark.parametrize("pattern", ["zipf", "identical"])
def test_lora_equals_reference_for_133_tokens(pattern, path):
    case = make_lora_case(torch.bfloat16, segments_of(pattern, 133), out_sizes=(48,))
    assert_equals_reference(case, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, (1,)), (16, (64, 3)), (300, (515, 7))])
def test_lora_equals_reference_for_every_width(sizes, dtype, path):
    in_features, out_sizes = sizes
    assert_equals_reference(make_lora_case(dtype, MIXED, in_features, out_sizes), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_and_shared_matrices_equal_reference(dtype, path):
    assert_equals_reference(make_general_case(dtype, GENERAL, 70, (150, 7)), dtype)


@pytest.mark.parametrize("pattern", ["distinct", "zipf", "skewed"])
def test_vectors_equal_reference_for_every_popularity(pattern):
    for num_tokens in (1, 12):
        case = make_general_case(torch.bfloat16, segments_of(pattern, num_tokens))
        assert_equals_reference(case, torch.bfloat16)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_each_kind_alone_equals_reference_and_differs_from_the_base(number):
    case = make_general_case(torch.float32, [(f"adapter{number}", 7)])
    assert_equals_reference(case, torch.float32)
    first_part = slice(case.out_bounds[1])
    result = case.expanded(KERNELS, case.shrink(KERNELS))
    assert not torch.isclose(result[:, first_part], case.y_TO[:, first_part]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_sums_of_many_tiles_equal_reference(num_tokens, dtype, path):
    names = ("adapter5", num_tokens, "adapter3", "adapter12")
    case = make_lora_case(dtype, [names, (None, 2)], 70, (200,))
    assert case.tiles.max_tiles[FIRST_SITE] > 4
    assert_equals_reference(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [999, 4131])
def test_sums_of_splits_equal_reference_and_leave_no_counts(in_features, dtype, path):
    case = make_lora_case(dtype, [("adapter2", 18), ("adapter3", 1)], in_features, (16,))
    plan = plans.of(case.tiles, DEVICE)
    blocks = shrink_blocks(in_features, dtype.itemsize, plan.table.cut, 4)
    for _ in range(2):
        h_QTR = case.shrink(KERNELS)
        assert_close(case.defined(h_QTR), case.defined(case.shrink(reference)), torch.float32)
        assert not plan.counters.any()
    if path == "decode" or in_features == 4131:
        assert blocks.split_features < in_features


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_two_runs_are_equal_bit_for_bit(dtype, path):
    case = make_general_case(dtype, FEW, 1300, (40, 7))
    h_QTR, again_QTR = case.shrink(KERNELS), case.shrink(KERNELS)
    assert torch.equal(case.defined(h_QTR), case.defined(again_QTR))
    assert torch.equal(case.expanded(KERNELS, h_QTR), case.expanded(KERNELS, again_QTR))


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_a_token_does_not_depend_on_its_batch(dtype, path):
    case = make_general_case(dtype, FEW, 1300, (40, 7))
    together_h = case.defined(case.shrink(KERNELS))
    together = case.expanded(KERNELS, together_h)
    for token in (0, 9, 11, 28, 30) if IS_INTERPRETED else range(31):
        alone = case.alone(token)
        h_QTR = alone.defined(alone.shrink(KERNELS))
        assert torch.equal(h_QTR[:, 0], together_h[:, token])
        assert torch.equal(alone.expanded(KERNELS, h_QTR)[0], together[token])


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_a_token_does_not_depend_on_the_tokens_beside_it(dtype, path):
    case = make_general_case(dtype, FEW, 1300, (40, 7))
    kept = [8, 12, 27, 29]
    others = make_general_case(dtype, FEW, 1300, (40, 7), seed=1)
    mixed = replace(case, x_TI=others.x_TI.clone(), y_TO=others.y_TO.clone())
    mixed.x_TI[kept], mixed.y_TO[kept] = case.x_TI[kept], case.y_TO[kept]
    h_QTR, mixed_h = case.defined(case.shrink(KERNELS)), mixed.defined(mixed.shrink(KERNELS))
    assert torch.equal(h_QTR[:, kept], mixed_h[:, kept])
    assert not torch.equal(h_QTR, mixed_h)
    result, mixed_result = case.expanded(KERNELS, h_QTR), mixed.expanded(KERNELS, mixed_h)
    assert torch.equal(result[kept], mixed_result[kept])
    assert not torch.equal(result, mixed_result)


def test_a_long_segment_is_cut_for_prefill_and_equals_reference():
    segments = [("adapter3", items.DECODE_TOKENS + 1), (None, 3), ("adapter5", 1)]
    case = make_lora_case(torch.bfloat16, segments, 70, (48, 13))
    assert plans.of(case.tiles, DEVICE).table.cut == items.PREFILL
    assert_equals_reference(case, torch.bfloat16)


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_what_no_tile_and_no_gain_touches_keeps_its_bits(dtype, path):
    case = make_general_case(dtype, [("adapter2", 9), (None, 4), ("adapter5", 3)])
    case.y_TO[9:13, ::2] = float("nan")
    case.y_TO[9:13, 1::2] = -0.0
    low = case.out_bounds[2]
    case.y_TO[:9, low:] = -0.0
    result = case.expanded(KERNELS, case.shrink(KERNELS)).view(torch.uint8)
    bits = case.y_TO.view(torch.uint8)
    low *= dtype.itemsize
    assert torch.equal(result[9:13], bits[9:13])
    assert torch.equal(result[:9, low:], bits[:9, low:])
    assert torch.equal(result[13:, low:], bits[13:, low:])
    assert not torch.equal(result[:9, :low], bits[:9, :low])
    assert not torch.equal(result[13:, :low], bits[13:, :low])


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_weights_that_are_not_numbers_stay_with_their_adapter(dtype, path):
    clean = make_lora_case(dtype, MIXED)
    poisoned = make_lora_case(dtype, MIXED, poisoned="adapter3")
    expected = clean.expanded(KERNELS, clean.shrink(KERNELS))
    result = poisoned.expanded(KERNELS, poisoned.shrink(KERNELS))
    others = [*range(14), 32, 33]
    assert torch.equal(result[others], expected[others])
    assert result[14:32].isnan().any(dim=1).all()


@pytest.mark.parametrize("dtype", SOME_DTYPES)
def test_a_token_that_is_not_a_number_stays_alone(dtype, path):
    case = make_lora_case(dtype, MIXED)
    expected = case.expanded(KERNELS, case.shrink(KERNELS))
    case.x_TI[3] = float("nan")
    result = case.expanded(KERNELS, case.shrink(KERNELS))
    others = [*range(3), *range(4, 34)]
    assert torch.equal(result[others], expected[others])
    assert result[3, :61].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_writes_only_its_columns_of_a_wider_tensor(dtype):
    case = make_lora_case(dtype, MIXED)
    h_QTR = case.shrink(KERNELS)
    width = case.y_TO.shape[1]
    wider = torch.full((34, width + 20), 7.0, dtype=dtype, device=DEVICE)
    part = wider[:, 9 : 9 + width]
    part.copy_(case.y_TO)
    KERNELS.lora_expand_(part, h_QTR, case.pool, case.tiles, FIRST_SITE, case.out_bounds)
    assert torch.equal(part.cpu(), case.expanded(KERNELS, h_QTR))
    assert (wider[:, :9] == 7).all()
    assert (wider[:, -11:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_rounded_to_nearest_even(dtype):
    case = make_lora_case(dtype, [("adapter4", 133)], out_sizes=(1,))
    tile = int(case.tiles.ranges[FIRST_SITE, 0, 0])
    case.tiles.scale[:] = 1.0
    assert int(case.tiles.ranks[tile]) == 1
    case.pool[int(case.tiles.bt_offset[tile])] = 1.0
    exact = torch.randn(133, generator=torch.Generator().manual_seed(1)) * 100
    ties = torch.tensor([1.00390625, 1.01171875, 1.00048828125, 1.00146484375, -1.00390625])
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, 65520.0])
    exact[:5], exact[5:10] = ties, special
    y_TO = torch.zeros(133, 1, dtype=dtype)
    h_QTR = torch.zeros(1, 133, 16)
    h_QTR[0, :, 0] = exact
    KERNELS.lora_expand_(y_TO, h_QTR, case.pool, case.tiles, FIRST_SITE, (0, 1))
    torch.testing.assert_close(y_TO[:, 0], exact.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_products_with_h_are_as_accurate_as_float32():
    case = make_lora_case(torch.bfloat16, [("adapter1", 5)], out_sizes=(64,))
    case.y_TO[:] = 0.0
    case.tiles.scale[:] = 1.0
    h_QTR = torch.zeros(1, 5, 16)
    tile = int(case.tiles.ranges[FIRST_SITE, 0, 0])
    assert int(case.tiles.ranks[tile]) == 16
    bt_at = int(case.tiles.bt_offset[tile])
    bt_RO = case.pool[bt_at : bt_at + 16 * 64].view(16, 64)
    bt_RO[1] = bt_RO[0]
    h_QTR[..., 0], h_QTR[..., 1] = 1.0 + 2.0**-20, -1.0
    result = case.expanded(KERNELS, h_QTR)
    expected_O = bt_RO[0].float() * 2.0**-20
    assert_close(result.float() * 2**20, expected_O.expand(5, 64) * 2**20, torch.bfloat16)
    assert (result != 0).all()


def test_rows_beyond_the_last_segment_are_left_alone(path):
    case = make_general_case(torch.bfloat16, FEW)
    result = case.expanded(KERNELS, case.shrink(KERNELS))
    padding = torch.full((3, case.x_TI.shape[1]), float("nan"), dtype=torch.bfloat16)
    more = torch.full((3, case.y_TO.shape[1]), 5.0, dtype=torch.bfloat16)
    padded = replace(case, x_TI=torch.cat([case.x_TI, padding]), y_TO=torch.cat([case.y_TO, more]))
    padded_result = padded.expanded(KERNELS, padded.shrink(KERNELS))
    assert torch.equal(padded_result[:-3], result)
    assert (padded_result[-3:] == 5).all()


def test_only_the_rows_that_a_tile_has_are_read(path):
    case = make_lora_case(torch.bfloat16, [("adapter4", 3)], out_sizes=(48,))
    assert int(case.tiles.ranks[0]) == 1
    a_at = int(case.tiles.a_offset[0])
    case.pool[:a_at], case.pool[a_at + 37 :] = float("nan"), float("nan")
    h_QTR = case.shrink(KERNELS)
    assert not h_QTR.isnan().any()
    assert (h_QTR[..., 0] != 0).all()


def test_columns_that_no_tile_has_are_not_read(path):
    case = make_general_case(torch.bfloat16, FEW)
    h_QTR = case.defined(case.shrink(KERNELS))
    spoiled = torch.full((*h_QTR.shape[:2], h_QTR.shape[2] + 16), float("nan"))
    is_defined = case.defined(torch.ones_like(h_QTR)).bool()
    spoiled[..., :-16][is_defined] = h_QTR[is_defined]
    assert spoiled.isnan().any()
    assert torch.equal(case.expanded(KERNELS, spoiled), case.expanded(KERNELS, h_QTR))


def test_a_wider_h_than_tables_need_changes_nothing(path):
    case = make_general_case(torch.bfloat16, FEW)
    wide = replace(case, tiles=replace(case.tiles, max_tiles=(9,) * len(case.tiles.max_tiles)))
    h_QTR, wide_h = case.shrink(KERNELS), wide.shrink(KERNELS)
    assert wide_h.shape[2] == 9 * 16 > h_QTR.shape[2]
    assert torch.equal(wide.defined(wide_h)[..., : h_QTR.shape[2]], case.defined(h_QTR))
    assert torch.equal(wide.expanded(KERNELS, wide_h), case.expanded(KERNELS, h_QTR))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gains_apply_where_no_segment_has_tiles(dtype):
    case = make_general_case(dtype, [("adapter6", 3), (None, 2), ("adapter7", 1)])
    no_tiles = torch.zeros_like(case.tiles.ranges)
    no_gains = case.tiles.gain_offset.clone()
    no_gains[:, -1] = -1
    case.tiles = replace(
        case.tiles, ranges=no_tiles, gain_offset=no_gains, max_tiles=(0,) * len(no_tiles)
    )
    h_QTR = case.shrink(KERNELS)
    assert h_QTR.shape == (3, 6, 0)
    result = case.expanded(KERNELS, h_QTR)
    assert_close(result, case.expanded(reference, h_QTR), dtype)
    assert not torch.isclose(result[:3], case.y_TO[:3]).all()
    assert torch.equal(result[3:5], case.y_TO[3:5])


def test_a_batch_without_tokens_is_left_as_it_is():
    case = make_general_case(torch.bfloat16, [])
    assert case.expanded(KERNELS, case.shrink(KERNELS)).shape == (0, 162)


def test_a_result_is_rounded_once():
    case = make_general_case(torch.bfloat16, [("adapter5", 5)], out_sizes=(300,))
    first, last = case.tiles.ranges[FIRST_SITE, 0].tolist()
    g_at, c_at = case.tiles.gain_offset[FIRST_SITE, 0].tolist()
    floats = case.pool.view(torch.float32)
    floats[g_at : g_at + 300], floats[c_at : c_at + 300] = 3.0, -3.0
    case.tiles.scale[:] = 1.0
    bt_at = int(case.tiles.bt_offset[first])
    case.pool[bt_at : bt_at + 300] = 1.0
    case.y_TO[:] = 1.0
    h_QTR = torch.zeros(1, 5, 16 * (last - first))
    h_QTR[:, :, 0] = 2.0**-9
    assert (case.expanded(KERNELS, h_QTR) == 3 * 2.0**-9).all()


@pytest.mark.parametrize("make", [make_lora_case, make_general_case])
def test_tables_loaded_into_an_arena_run_through_the_table_bound_to_it(make):
    arena = PlanArena(DEVICE)
    whole = make(torch.bfloat16, MIXED)
    bounds = replace(whole.tiles, max_tiles=(4,) * 4, has_gains=(True,) * 4)
    for number, segments in enumerate((slice(0, 5), slice(3, 4), slice(1, 5))):
        case = some_segments(whole, segments)
        assert arena.load(case.tiles) == (number == 0)
        with plans.bind(bounds, arena):
            loaded = replace(case, tiles=bounds)
            h_QTR = loaded.shrink(KERNELS)
            result = loaded.expanded(KERNELS, h_QTR)
        assert h_QTR.shape[2] == 64
        expected_h = case.shrink(reference)
        found = case.defined(h_QTR[..., : expected_h.shape[2]])
        assert_close(found, case.defined(expected_h), torch.float32)
        assert torch.equal(result, case.expanded(KERNELS, case.shrink(KERNELS)))
        assert not torch.equal(result, case.y_TO)
        assert not arena.plan.counters.any()


def some_segments(case: LoraCase, segments: slice) -> LoraCase:
    """The same for adjacent segments only."""
    bounds = case.tiles.segments[segments.start : segments.stop + 1]
    tokens = slice(int(bounds[0]), int(bounds[-1]))
    tiles = replace(
        case.tiles,
        segments=bounds - bounds[0],
        ranges=case.tiles.ranges[:, segments].contiguous(),
        gain_offset=case.tiles.gain_offset[:, segments].contiguous(),
    )
    return replace(
        case,
        x_TI=case.x_TI[tokens],
        y_TO=case.y_TO[tokens],
        tiles=tiles,
        segments=case.segments[segments],
    )


def test_wrong_arguments_are_named():
    case = make_lora_case(torch.float32, MIXED)
    x_TI, pool, tiles = case.x_TI.to(DEVICE), case.pool.to(DEVICE), case.tiles
    h_QTR, y_TO = case.shrink(KERNELS).to(DEVICE), case.y_TO.to(DEVICE)
    narrow = replace(tiles, max_tiles=(0, 1, 1, 1))
    for arguments, message in (
        ((x_TI.T, pool, tiles, 1, 3), "x_TI"),
        ((x_TI.half(), pool, tiles, 1, 3), "pool is torch.float32"),
        ((x_TI.double(), pool.double(), tiles, 1, 3), "x_TI is torch.float64"),
        ((x_TI, pool, tiles, 2, 3), "sites 2 to 4"),
        ((x_TI[:33], pool, tiles, 1, 3), "tiles.segments"),
        ((x_TI, pool, narrow, 1, 3), "tiles.max_tiles"),
        ((x_TI, pool[:500], tiles, 1, 3), "a tile lies outside"),
        ((torch.cat([x_TI, x_TI], 1), pool, tiles, 1, 3), "less than a row"),
        ((x_TI.to("meta"), pool, tiles, 1, 3), "x_TI is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.lora_shrink(*arguments)
    before = y_TO.clone()
    for arguments, message in (
        ((y_TO, h_QTR.half(), pool, tiles, 1, case.out_bounds), "h_QTR"),
        ((y_TO, h_QTR[..., :16].contiguous(), pool, tiles, 1, case.out_bounds), "h_QTR has fewer"),
        ((y_TO, h_QTR[..., :47].contiguous(), pool, tiles, 1, case.out_bounds), "no multiple"),
        ((y_TO, h_QTR, pool, tiles, 1, (0, 48, 61)), "out_bounds"),
        ((y_TO, h_QTR, pool[:500], tiles, 1, case.out_bounds), "a tile lies outside"),
        ((y_TO[:9], h_QTR[:, :9].contiguous(), pool, tiles, 1, case.out_bounds), "tiles.segments"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.lora_expand_(*arguments)
    assert torch.equal(y_TO, before)
