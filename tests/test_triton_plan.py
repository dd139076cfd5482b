"""What a tile table becomes on the device: its items, its checks, and its place for CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernel_cases import FIRST_SITE, NUM_SITES, make_general_case, make_lora_case, segments_of
from loraswarm.kernels import TileTable
from loraswarm.kernels.triton import items
from loraswarm.kernels.triton.expand import expand_blocks
from loraswarm.kernels.triton.extents import SiteExtents
from loraswarm.kernels.triton.items import DECODE, PREFILL, Cut
from loraswarm.kernels.triton.launch import DEVICE_TYPE
from loraswarm.kernels.triton.plan import PlanArena, Plans
from loraswarm.kernels.triton.shrink import shrink_blocks
from loraswarm.kernels.triton.words import (
    A_OFFSET,
    BT_STRIDE,
    RANKS,
    SCALE,
    TILE_WORDS,
    U_OFFSET,
    HostTable,
    PlanWords,
)

DEVICE = torch.empty(0, device=DEVICE_TYPE).device
MIXED = [
    ("adapter0", 70),
    (None, 4),
    ("adapter2", 1),
    ("adapter3", 33),
    ("adapter4", 2, "adapter2"),
    ("adapter6", 7),
    ("adapter9", 64, "adapter3", "adapter12"),
]


@pytest.fixture
def plans() -> Plans:
    return Plans()


def arrays_of(tiles: TileTable) -> dict[str, np.ndarray]:
    return {
        name: getattr(tiles, name).numpy()
        for name in TileTable.__dataclass_fields__
        if name not in ("max_tiles", "has_gains")
    }


def host_table(tiles: TileTable, cut: Cut | None = None) -> HostTable:
    arrays = arrays_of(tiles)
    return HostTable(arrays, SiteExtents(arrays), cut)


def item_words(section: torch.Tensor, count: int) -> list[list[int]]:
    return section.cpu()[: items.ITEM_WORDS * count].view(count, items.ITEM_WORDS).tolist()


def chunks(tiles: TileTable, segment: int, cut: Cut) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each."""
    begin, end = tiles.segments[segment : segment + 2].tolist()
    starts = range(begin, end, cut.item_tokens)
    return [(first, min(cut.item_tokens, end - first)) for first in starts]


@pytest.mark.parametrize("cut", [DECODE, PREFILL, Cut(5, 2)])
def test_shrink_items_are_every_group_of_tiles_for_every_chunk_of_tokens(cut):
    tiles = make_general_case(torch.float32, MIXED).tiles
    table = host_table(tiles, cut)
    expected, starts = [], [0]
    for site in range(NUM_SITES):
        for segment, (first, last) in enumerate(tiles.ranges[site].tolist()):
            for first_token, num_tokens in chunks(tiles, segment, cut):
                for tile in range(first, last, cut.item_tiles):
                    num_tiles = min(cut.item_tiles, last - tile)
                    column = 16 * (tile - first)
                    expected.append([first_token, num_tokens, tile, num_tiles, column, site])
        starts.append(len(expected))
    words = table.words()
    found = item_words(words.shrink_items, table.shrink.num_items)
    assert [item[:6] for item in found] == expected
    assert words.shrink_starts.tolist() == starts
    assert len(expected) > len(MIXED)


@pytest.mark.parametrize("cut", [DECODE, PREFILL, Cut(5, 2)])
def test_expand_items_are_the_chunks_of_units_with_tiles_or_gains(cut):
    tiles = make_general_case(torch.float32, MIXED).tiles
    table = host_table(tiles, cut)
    expected, starts, gains = [], [0], []
    for site in range(NUM_SITES):
        for segment, (first, last) in enumerate(tiles.ranges[site].tolist()):
            pair = tiles.gain_offset[site, segment].tolist()
            number = len(gains) if max(pair) >= 0 else -1
            if number >= 0:
                gains.append(pair)
            if first == last and number < 0:
                continue
            for first_token, num_tokens in chunks(tiles, segment, cut):
                expected.append([first_token, num_tokens, first, last - first, number])
        starts.append(len(expected))
    words = table.words()
    found = item_words(words.expand_items, table.expand.num_items)
    assert [item[:5] for item in found] == expected
    assert words.expand_starts.tolist() == starts
    assert words.gains[: 2 * len(gains)].view(-1, 2).tolist() == gains
    assert any(item[3] == 0 and item[4] >= 0 for item in expected)
    assert any(item[3] > 0 and item[4] < 0 for item in expected)


def test_work_follows_the_active_pairs_and_not_the_sites_or_segments():
    base = [(None, 3), (None, 2), (None, 1)]
    one = host_table(make_lora_case(torch.float32, [("adapter1", 1), *base]).tiles)
    none = host_table(make_lora_case(torch.float32, base).tiles)
    assert none.sizes.num_shrink_items == none.sizes.num_expand_items == 0
    assert one.sizes.num_shrink_items == 1 + 2 + 3
    assert one.sizes.num_expand_items == 3


def test_the_longest_segment_decides_how_a_batch_is_cut():
    lengths = (1, items.DECODE_TOKENS, items.DECODE_TOKENS + 1)
    tables = [
        host_table(make_lora_case(torch.float32, [("adapter1", length), (None, 2)]).tiles)
        for length in lengths
    ]
    assert [table.cut for table in tables] == [DECODE, DECODE, PREFILL]


def test_words_have_every_tile_on_host_and_device(plans):
    tiles = make_general_case(torch.float32, MIXED).tiles
    words = plans.of(tiles, DEVICE).words
    num_tiles = tiles.ranks.numel()
    records = words.tiles.cpu()[: TILE_WORDS * num_tiles].view(num_tiles, TILE_WORDS)
    assert torch.equal(records[:, A_OFFSET], tiles.a_offset)
    assert torch.equal(records[:, BT_STRIDE], tiles.bt_stride)
    assert torch.equal(records[:, U_OFFSET], tiles.u_offset)
    assert torch.equal(records[:, RANKS], tiles.ranks.long())
    scales = words.scales.cpu()[: 2 * TILE_WORDS * num_tiles].view(num_tiles, 2 * TILE_WORDS)
    assert torch.equal(scales[:, 2 * SCALE], tiles.scale)


def test_sections_lie_apart_on_whole_cache_lines():
    words = PlanWords(host_table(make_lora_case(torch.float32, MIXED).tiles).sizes, DEVICE)
    ends = [section.data_ptr() + 4 * section.numel() for section in words.sections]
    begins = [section.data_ptr() for section in words.sections]
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
    assert all((begin - begins[0]) % 64 == 0 for begin in begins)
    assert words.packed.numel() * 4 == ends[-1] - begins[0]


def test_a_plan_is_made_once_and_anew_for_other_segments_or_tensors(plans):
    tiles = make_lora_case(torch.float32, [("adapter1", 2), (None, 2)]).tiles
    plan = plans.of(tiles, DEVICE)
    same = replace(tiles, segments=tiles.segments.clone())
    longer = replace(tiles, segments=torch.tensor([0, 3, 4, 4], dtype=torch.int32))
    scaled = replace(tiles, scale=tiles.scale * 2)
    assert plans.of(tiles, DEVICE) is plan
    assert plans.of(same, DEVICE) is plan
    assert plans.of(longer, DEVICE) is not plan
    assert plans.of(longer, DEVICE).table.extents is plan.table.extents
    assert plans.of(scaled, DEVICE) is not plan
    assert plans.of(tiles, DEVICE) is plan


def test_a_tensor_that_was_written_meanwhile_makes_another_plan(plans):
    tiles = make_lora_case(torch.float32, [("adapter1", 2), (None, 2)]).tiles
    other = replace(tiles, max_tiles=tiles.max_tiles)
    plan = plans.of(tiles, DEVICE)
    tiles.scale[:] = 7.0
    assert plans.of(other, DEVICE) is not plan
    assert (plans.of(other, DEVICE).words.scales.cpu() == 7.0).any()


def test_only_the_last_plans_are_kept(plans):
    tables = [make_lora_case(torch.float32, [("adapter1", n)]).tiles for n in range(1, 7)]
    made = [plans.of(tiles, DEVICE) for tiles in tables]
    assert plans.of(tables[-2], DEVICE) is made[-2]
    assert plans.of(tables[0], DEVICE) is not made[0]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("segments", [0, 3, 2, 4], "tiles.segments must ascend"),
        ("segments", [1, 2, 3, 4], "tiles.segments must go from 0"),
        ("segments", [0, 4], "another number of segments"),
        ("ranks", [5, 17], "tiles.ranks must be from 1 to 16"),
        ("ranks", [0, 5], "tiles.ranks must be from 1 to 16"),
        ("scale", [1.0, 2.0, 3.0], "tiles.scale has another length"),
        ("gain_offset", [[-1, -1]], "tiles.gain_offset has another shape"),
    ],
)
def test_a_wrong_table_is_named(plans, name, values, message):
    tiles = make_lora_case(torch.float32, [("adapter4", 2), (None, 2)], out_sizes=(8,)).tiles
    assert tiles.ranks.numel() == 2
    changed = torch.tensor([values] if name == "gain_offset" else values)
    changed = changed.to(getattr(tiles, name).dtype)
    with pytest.raises(ValueError, match=message):
        plans.of(replace(tiles, **{name: changed}), DEVICE)


def test_a_range_of_tiles_that_do_not_exist_is_named(plans):
    tiles = make_lora_case(torch.float32, [("adapter4", 2)]).tiles
    for last in (tiles.ranks.numel() + 1, 1000):
        ranges = tiles.ranges.clone()
        ranges[FIRST_SITE, 0, 1] = last
        with pytest.raises(ValueError, match=r"tiles\.ranges names tiles that do not exist"):
            plans.of(replace(tiles, ranges=ranges), DEVICE)


FAULTS = [
    ("a_offset", -1, "a tile lies outside"),
    ("a_offset", 10**9, "a tile lies outside"),
    ("a_stride", 36, "less than a row"),
    ("bt_offset", -1, "a tile lies outside"),
    ("bt_offset", 10**9, "a tile lies outside"),
    ("bt_stride", 47, "less than a row"),
    ("u_offset", 10**9, r"tiles\.u_offset"),
    ("u_offset", -2, r"tiles\.u_offset"),
    ("v_offset", 10**9, r"tiles\.v_offset"),
    ("v_offset", -2, r"tiles\.v_offset"),
    ("gain_offset", 10**9, r"tiles\.gain_offset"),
    ("gain_offset", -2, r"tiles\.gain_offset"),
]


@pytest.mark.parametrize(("name", "value", "message"), FAULTS)
def test_what_leads_out_of_the_pool_is_named_where_it_is_used(plans, name, value, message):
    case = make_general_case(torch.float32, [("adapter0", 2), ("adapter1", 2)])
    tensor = getattr(case.tiles, name).clone()
    tile = int(case.tiles.ranges[FIRST_SITE, 1, 0])
    tensor[(FIRST_SITE, 1, 0) if name == "gain_offset" else (tile,)] = value
    plan = plans.of(replace(case.tiles, **{name: tensor}), DEVICE)
    num_columns = 16 * case.tiles.part_tiles(FIRST_SITE, 3)

    def check_all(first_site: int) -> None:
        part = first_site - FIRST_SITE
        bounds = (0, case.out_bounds[part + 1] - case.out_bounds[part])
        plan.shrink_items(first_site, 1, 37, num_columns, case.pool)
        plan.expand_items(first_site, bounds, num_columns, case.pool)

    with pytest.raises(ValueError, match=message):
        check_all(FIRST_SITE)
    check_all(FIRST_SITE + 1)


def test_a_stride_counts_where_a_tile_has_more_than_one_row(plans):
    case = make_lora_case(torch.float32, [("adapter1", 1)], out_sizes=(8,))
    last_row = int((case.tiles.a_offset + 15 * case.tiles.a_stride).max())
    plan = plans.of(case.tiles, DEVICE)
    assert plan.shrink_items(FIRST_SITE, 1, 37, 16, case.pool[: last_row + 37]) == 1
    with pytest.raises(ValueError, match="a tile lies outside"):
        plan.shrink_items(FIRST_SITE, 1, 37, 16, case.pool[: last_row + 36])


def test_alignment_is_that_of_the_worst_offset_or_stride():
    tiles = make_lora_case(torch.float32, [("adapter1", 1)], 64, (64, 64)).tiles
    starts = torch.arange(tiles.ranks.numel()) * 64
    tiles = replace(tiles, a_offset=starts.clone(), bt_offset=starts)
    assert SiteExtents(arrays_of(tiles)).alignment() == 8
    tiles.a_offset[0] += 4
    extents = SiteExtents(arrays_of(tiles))
    assert extents.a_alignment(FIRST_SITE, 1) == 4
    assert extents.a_alignment(FIRST_SITE + 1, 1) == 8
    assert extents.bt_alignment(FIRST_SITE, 2) == 8
    assert extents.alignment() == 4
    tiles.bt_stride[0] += 1
    assert SiteExtents(arrays_of(tiles)).alignment() == 1


def test_variants_of_kernels_are_few():
    shrinks = {
        shrink_blocks(4096, 2, cut, most_tiles)
        for cut in (DECODE, PREFILL)
        for most_tiles in range(1, 200)
    }
    expands = {
        expand_blocks(4096, cut, most_tiles, has_v, 8)
        for cut in (DECODE, PREFILL)
        for most_tiles in range(200)
        for has_v in (False, True)
    }
    assert len(shrinks) == 4
    assert len(expands) == 5


@pytest.mark.parametrize("cut", [DECODE, PREFILL])
@pytest.mark.parametrize("item_size", [2, 4])
@pytest.mark.parametrize("in_features", [1, 3, 64, 133, 896, 4096, 14336, 28672, 100001])
def test_splits_cover_the_row_and_depend_on_the_width_alone(in_features, item_size, cut):
    several = [shrink_blocks(in_features, item_size, cut, tiles) for tiles in (1, 2, 9)]
    assert len({(blocks.split_features, blocks.block_features) for blocks in several}) == 1
    split, block = several[0].split_features, several[0].block_features
    num_splits = -(-in_features // split)
    assert block >= 16
    assert split % block == 0
    assert num_splits * split >= in_features
    assert num_splits <= 16


def test_an_arena_keeps_its_addresses_while_tables_fit():
    arena = PlanArena(DEVICE)
    assert arena.load(make_lora_case(torch.float32, segments_of("zipf", 3)).tiles)
    before = arena.plan
    addresses = [section.data_ptr() for section in before.words.sections]
    for num_tokens in (1, 7, 33):
        assert not arena.load(make_lora_case(torch.float32, segments_of("zipf", num_tokens)).tiles)
        assert arena.plan is before
        assert [section.data_ptr() for section in arena.plan.words.sections] == addresses


def test_an_arena_says_when_it_has_grown():
    arena = PlanArena(DEVICE)
    small = make_lora_case(torch.float32, [("adapter5", 2)]).tiles
    large = make_lora_case(torch.float32, segments_of("distinct", 700)).tiles
    assert arena.load(small)
    capacity = arena.plan.words.sizes
    assert arena.load(large)
    assert arena.plan.words.sizes.num_tiles > capacity.num_tiles
    assert not arena.load(small)
    assert not arena.load(large)


def test_an_arena_says_when_rows_are_less_aligned_or_a_v_appears():
    arena = PlanArena(DEVICE)
    tiles = make_lora_case(torch.float32, [("adapter1", 1)], 64, (64,)).tiles
    starts = torch.arange(tiles.ranks.numel()) * 8
    even = replace(tiles, a_offset=starts, bt_offset=starts)
    odd = replace(even, a_offset=starts + 2)
    with_v = replace(even, v_offset=starts)
    for tiles in (even, odd, with_v):
        assert arena.load(tiles)
        assert not arena.load(tiles)
    for tiles in (even, odd):
        assert not arena.load(tiles)


def test_an_arena_says_when_a_graph_has_too_few_columns():
    arena = PlanArena(DEVICE)
    narrow = make_lora_case(torch.float32, [("adapter1", 1)])
    wide = make_lora_case(torch.float32, [("adapter5", 1)])
    arena.load(narrow.tiles)
    assert not arena.load(wide.tiles)
    assert not arena.load(narrow.tiles)
    arena.plan.shrink_items(FIRST_SITE, 1, 37, 32, narrow.pool)
    assert narrow.tiles.max_tiles[FIRST_SITE] <= 2 < wide.tiles.max_tiles[FIRST_SITE]
    assert arena.load(wide.tiles)


def test_an_arena_refuses_what_its_graphs_would_read_outside_of_the_pool():
    arena = PlanArena(DEVICE)
    case = make_lora_case(torch.float32, [("adapter1", 1)])
    arena.load(case.tiles)
    arena.plan.shrink_items(FIRST_SITE, 3, 37, 64, case.pool)
    outside = replace(case.tiles, a_offset=case.tiles.a_offset + 10**9)
    with pytest.raises(ValueError, match="a tile lies outside"):
        arena.load(outside)
    num_tiles = case.tiles.ranks.numel()
    records = arena.plan.words.tiles.cpu()[: TILE_WORDS * num_tiles].view(num_tiles, TILE_WORDS)
    assert torch.equal(records[:, A_OFFSET], case.tiles.a_offset)
    assert not arena.load(case.tiles)


def test_a_bound_table_has_the_plan_of_its_arena_until_it_is_released(plans):
    arena = PlanArena(DEVICE)
    bound = make_lora_case(torch.float32, [("adapter1", 1)]).tiles
    other = make_lora_case(torch.float32, [("adapter2", 1)]).tiles
    arena.load(bound)
    with plans.bind(bound, arena):
        assert plans.of(bound, DEVICE) is arena.plan
        assert plans.of(other, DEVICE) is not arena.plan
    assert plans.of(bound, DEVICE) is not arena.plan


def test_plans_work_inside_and_outside_of_inference_mode(plans):
    arena = PlanArena(DEVICE)
    tables = [make_lora_case(torch.float32, segments_of("zipf", n)).tiles for n in (3, 7)]
    with torch.inference_mode():
        made_inside = make_lora_case(torch.float32, segments_of("zipf", 5)).tiles
        arena.load(tables[0])
        plan = plans.of(made_inside, DEVICE)
    assert not arena.load(tables[1])
    assert plans.of(made_inside, DEVICE) is plan
