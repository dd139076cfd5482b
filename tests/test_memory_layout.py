"""How adapters are cut and packed: every rank and column once, no overlap, little left over."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from loraswarm.adapters.adapter import ModuleInfo
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.memory import Memory
from loraswarm.memory.packing import pack
from loraswarm.memory.tile_layout import adapter_bytes, adapter_layout, shared_layout
from memory_cases import LLAMA_SHAPE, QUERY_AND_VALUE, QWEN_SHAPE, describe, lora, vera
from scheduler_cases import GEOMETRY, SHAPE

QWEN_GEOMETRY = page_geometry(QWEN_SHAPE, 2)
ALL_LINEARS = tuple(range(7))


def check_places(packing, sizes, geometry):
    """Assert that blocks lie in their pieces, aligned and apart; returns the elements used."""
    piece_sizes = [geometry.page_elements] * packing.num_pages
    piece_sizes += [size for sizes_of_bin in packing.bins for size in sizes_of_bin]
    taken = {piece: [] for piece in range(len(piece_sizes))}
    for (piece, element), size in zip(packing.places, sizes, strict=True):
        assert element % geometry.alignment_elements == 0
        taken[piece].append((element, element + size))
    for piece, spans in taken.items():
        spans.sort()
        assert spans, f"piece {piece} is empty"
        assert spans[-1][1] <= piece_sizes[piece]
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(sum(sizes_of_bin) <= geometry.page_elements for sizes_of_bin in packing.bins)


def test_blocks_of_any_size_are_packed_apart_and_full_pages_are_full():
    rng = random.Random(0)
    for _ in range(200):
        top = rng.choice([20, 200, GEOMETRY.page_elements])
        sizes = [rng.randint(1, top) for _ in range(rng.choice([1, 3, 7, 133]))]
        packing = pack(sizes, GEOMETRY)
        check_places(packing, sizes, GEOMETRY)
        used = [0] * packing.num_pages
        for (piece, _), size in zip(packing.places, sizes, strict=True):
            if piece < packing.num_pages:
                used[piece] += -(-size // GEOMETRY.alignment_elements) * 16
        assert all(8 * elements >= 7 * GEOMETRY.page_elements for elements in used)
        largest = max(GEOMETRY.page_elements // 16, max(sizes) + 15)
        assert all(size <= largest for sizes_of_bin in packing.bins for size in sizes_of_bin)


def test_nothing_takes_no_page():
    assert pack([], GEOMETRY).max_pages == 0


def test_a_block_larger_than_a_page_is_a_bug():
    with pytest.raises(AssertionError, match="larger than a page"):
        pack([GEOMETRY.page_elements + 1], GEOMETRY)


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 17, 40, 64])
def test_layout_covers_every_rank_once_without_overlap(rank):
    layout = adapter_layout(lora("a", QWEN_SHAPE, rank), QWEN_SHAPE, QWEN_GEOMETRY)
    sizes = [block.num_rows * block.num_columns for block in layout.blocks]
    check_places(layout.packing, sizes, QWEN_GEOMETRY)
    for kind, width_of in (("a", 0), ("bt", 1)):
        ranks = {}
        for block in layout.blocks:
            if block.kind == kind:
                rows = range(block.first_row, block.first_row + block.num_rows)
                ranks.setdefault(block.index, []).extend(rows)
                assert block.num_columns == QWEN_SHAPE.site_sizes(block.index)[width_of]
        assert ranks == {site: list(range(rank)) for site in range(QWEN_SHAPE.num_linears)}
    least = sum(sizes) / QWEN_GEOMETRY.page_elements
    assert layout.packing.max_pages <= 1 + least / 0.85


@pytest.mark.parametrize("shape", [SHAPE, QWEN_SHAPE])
def test_the_lm_head_is_cut_by_columns_over_one_a(shape):
    geometry = page_geometry(shape, 2)
    info = describe("head", [ModuleInfo(shape.head_site, 18, 1.0, ("u", "v", "g", "c"))])
    layout = adapter_layout(info, shape, geometry)
    by_kind = {}
    for block in layout.blocks:
        by_kind.setdefault(block.kind, []).append(block)
    assert [block.num_rows for block in by_kind["a"]] == [16, 2]
    assert len(by_kind["u"]) == 1
    num_parts = len(shape.head_bounds()) - 1
    assert num_parts > 1
    assert len(by_kind["bt"]) == 2 * num_parts
    for kind in ("v", "g", "c"):
        ends = [block.first_column + block.num_columns for block in by_kind[kind]]
        assert tuple(ends) == shape.head_bounds()[1:]
    tiles = layout.tiles
    assert tiles.sites.tolist() == [
        shape.head_site + part for part in range(num_parts) for _ in "ab"
    ]
    assert tiles.a_refs.tolist() == tiles.a_refs[:2].tolist() * num_parts
    assert len(set(tiles.bt_refs.tolist())) == 2 * num_parts


def test_adapters_of_one_recipe_share_a_layout_and_others_do_not():
    one = lora("one", QWEN_SHAPE, 8)
    assert adapter_layout(one, QWEN_SHAPE, QWEN_GEOMETRY) is adapter_layout(
        lora("two", QWEN_SHAPE, 8, scale=0.5), QWEN_SHAPE, QWEN_GEOMETRY
    )
    vera_a, vera_b = vera("a", QWEN_SHAPE, 8), vera("b", QWEN_SHAPE, 8, label="other")
    assert adapter_layout(vera_a, QWEN_SHAPE, QWEN_GEOMETRY) is adapter_layout(
        vera_b, QWEN_SHAPE, QWEN_GEOMETRY
    )
    with_gain = replace(one, modules=(replace(one.modules[0], vectors=("g",)), *one.modules[1:]))
    assert adapter_layout(one, QWEN_SHAPE, QWEN_GEOMETRY) is not adapter_layout(
        with_gain, QWEN_SHAPE, QWEN_GEOMETRY
    )


def test_bytes_count_an_adapters_own_blocks_and_shared_ones_apart():
    info = vera("a", QWEN_SHAPE, 256, QUERY_AND_VALUE)
    own, shared = adapter_bytes(info, QWEN_SHAPE, QWEN_GEOMETRY)
    assert own == 4 * 24 * (256 + 896 + 256 + 128)
    assert shared == 2 * 256 * (4864 + 4864)


@pytest.mark.parametrize("width", [1, 128, 129, 997])
def test_a_shared_matrix_is_cut_like_the_lm_head_where_it_is_wider_than_any_linear(width):
    layout = shared_layout(21, width, SHAPE, GEOMETRY)
    cells = [
        (row, column)
        for block in layout.blocks
        for row in range(block.first_row, block.first_row + block.num_rows)
        for column in range(block.first_column, block.first_column + block.num_columns)
    ]
    assert sorted(cells) == list(itertools.product(range(21), range(width)))
    assert len(cells) == len(set(cells))


@pytest.mark.parametrize(
    ("shape", "targets"),
    [(QWEN_SHAPE, ALL_LINEARS), (QWEN_SHAPE, QUERY_AND_VALUE), (LLAMA_SHAPE, QUERY_AND_VALUE)],
)
def test_a_hundred_vera_adapters_take_little_more_than_their_vectors_and_one_pair(shape, targets):
    geometry = page_geometry(shape, 2)
    memory = Memory.of_pages(2000, shape, geometry)
    for number in range(100):
        memory.adapters.pin(vera(f"v{number}", shape, 256, targets))
    memory.adapters.check()
    outs = [shape.target_sizes[target][1] for target in targets]
    vector_bytes = 4 * shape.num_layers * sum(256 + out for out in outs)
    widest_in = max(in_size for in_size, _ in shape.target_sizes)
    pair_bytes = 2 * 256 * (widest_in + max(out for _, out in shape.target_sizes))
    least = pair_bytes + 100 * vector_bytes
    assert memory.pool.num_owned("adapter") * geometry.page_bytes <= 1.2 * least
    assert memory.pool.num_owned("adapter") * geometry.page_bytes >= least


def test_small_adapters_on_large_pages_share_them():
    """Rank 4 on two linears fills half a page here; alone it would take a whole one."""
    geometry = page_geometry(LLAMA_SHAPE, 2)
    memory = Memory.of_pages(200, LLAMA_SHAPE, geometry)
    sites = [layer * 7 + target for layer in range(32) for target in QUERY_AND_VALUE]
    for number in range(40):
        memory.adapters.pin(describe(f"a{number}", [ModuleInfo(site, 4, 1.0) for site in sites]))
    used = 40 * 64 * 2 * 4 * 4096
    assert memory.pool.num_owned("adapter") <= 1.1 * used / geometry.page_elements + 1
    assert memory.pool.num_owned("adapter") <= 40 * 0.6
